"""Where a run starts from: its own newest checkpoint, an earlier one if its end was moved, or another run's.

Learning rate, ρ and the kind of a step depend on the settings and on the number of completed steps alone. A checkpoint
therefore belongs to a run of other length too, if all three agree for every step before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core import UserError
from fsam_trainers import checkpoints, pretrained
from fsam_trainers.checkpoints import Checkpoint
from fsam_trainers.config import END, Settings, difference
from fsam_trainers.console import Console
from fsam_trainers.files import checksum, disk_errors, sweep
from fsam_trainers.models.vit_layout import config_of

# What a branch shares with its base, besides the model's sizes: the framework's weights, and the batches of each step.
SHARED = ("framework", "batch", "seed")


class BranchPoint(NamedTuple):
    """A checkpoint of another run."""

    run: Path
    step: int

    @classmethod
    def parse(cls, text: str) -> BranchPoint:
        """
        Raises:
            UserError: for text that is not RUN@STEP.
        """
        run, at, step = text.rpartition("@")
        if not at or not run or not step.isdigit():
            raise UserError(f"--branch-from must be RUN@STEP, the folder of a run and a step; got {text!r}")
        return cls(Path(run), int(step))


class Start(NamedTuple):
    """A checkpoint to start from."""

    checkpoint: Checkpoint
    source: Settings | None = None
    """The settings of the other run that the checkpoint belongs to; None if it is this run's own."""
    branch: dict[str, Any] | None = None
    """The entry of the new run's checkpoints that tells what it branched from."""


def begun_of(settings: Settings) -> dict[str, str] | None:
    """The entry of a run's checkpoints that tells which weights it began with; None where --seed has drawn them."""
    if settings.init_from is None:
        return None
    return {"source": settings.init_from, "fingerprint": pretrained.find(settings.init_from, "--init-from").fingerprint}


def clear(out: Path, settings: Settings, data: str, corpus_folder: Path, branch_from: BranchPoint | None) -> None:
    """Delete the run in `out`: --fresh.

    Raises:
        UserError: before anything is deleted, for a run that is needed and a new one that cannot begin; and when the
            disk refuses.
    """
    first = settings.init_from and pretrained.checkpoint_of(Path(settings.init_from).expanduser())[0]
    for argument, source in (("--init-from", first), ("--branch-from", branch_from and branch_from.run)):
        if source and source.resolve() == out.resolve():
            raise UserError(f"--fresh would delete {out}, which {argument} starts from; give another --out")
    if branch_from:
        _branch(branch_from, settings, data)
    with disk_errors(out):
        if (out / "checkpoints").exists():
            shutil.rmtree(out / "checkpoints")
        own = () if out.resolve() == corpus_folder.resolve() else pretrained.TOKENIZERS
        for name in ("metrics.jsonl", "config.toml", "wandb.id", *own):
            (out / name).unlink(missing_ok=True)


def start(
    out: Path,
    settings: Settings,
    data: str,
    branch_from: BranchPoint | None,
    begun: Mapping[str, str] | None,
    console: Console,
) -> Start | None:
    """What the run in `out` starts from; None for initial weights.

    Checkpoints that belong to another end of the run than this one's are moved to OUT/ended-at-STEP, or …-2 and so on.

    Raises:
        UserError: for a folder that holds another run or damaged checkpoints, and for a branch that does not fit.
    """
    root = out / "checkpoints"
    sweep(root)
    newest = checkpoints.newest(root, console.warn)
    if newest is None:
        return None if branch_from is None else _branch(branch_from, settings, data)
    mine, other = settings.as_dict(), newest.run["settings"]
    if changed := difference(mine, other, ignored=(*END, "init_from")):
        raise UserError(
            f"--out: {out} holds a run with {changed}; give the same settings, another --out, or `fsam train` --fresh"
        )
    if data != newest.run["data"]:
        raise UserError(f"--out: {out} holds a run on other data or another tokenizer; give the same, or another --out")
    if branch_from and not _is_branch(newest.run.get("branch"), branch_from):
        raise UserError(f"--out: {out} holds another run than the branch from {branch_from.run}; give another --out")
    first = newest.run.get("begun")
    if "branch" not in newest.run and (begun and begun["fingerprint"]) != (first and first["fingerprint"]):
        got = f"those that {settings.init_from} has now" if begun else "drawn by --seed"
        held = f"the weights of {first['source']} as it was then" if first else "weights drawn by --seed"
        raise UserError(
            f"--init-from: {out} holds a run that began with {held}, and now they are {got}; give the same (RUN@STEP "
            "names a checkpoint), another --out, or `fsam train` --fresh"
        )
    if not (changed := difference(mine, other, ignored=("init_from",))):
        return Start(newest)
    for found in checkpoints.intact(root, console.warn):
        if _agrees_up_to(found, settings):
            _set_aside(out, found, console)
            console.say(f"extending {out} from step {_step(found)}, to the bit as one run: {changed}")
            return Start(found)
    if settings.steps <= other["steps"]:
        raise UserError(
            f"--out: {out} holds a run with {changed}, and none of its checkpoints is a beginning of this one; give "
            "more --steps to extend it, the same settings, another --out, or `fsam train` --fresh"
        )
    completed = _completed(newest)
    console.warn(
        f"extending {out} from step {_step(newest)}: its steps so far followed the schedule of {other['steps']} steps, "
        f"at the learning rate {_of(newest, settings).learning_rate_at(completed):.3g} now, which becomes "
        f"{settings.learning_rate_at(completed):.3g}; a run of {settings.steps} steps from the start would differ"
    )
    return Start(newest)


def _branch_of(point: BranchPoint) -> dict[str, Any]:
    listed = checkpoints.folder_of(point.run / "checkpoints", point.step) / "files.json"
    return {"run": str(point.run.resolve()), "step": point.step, "checkpoint": checksum(listed)}


def _is_branch(entry: dict[str, Any] | None, point: BranchPoint) -> bool:
    """Whether a run with this entry has branched from there; the base may have been moved, or deleted since."""
    if entry is None or entry["step"] != point.step:
        return False
    if checkpoints.folder_of(point.run / "checkpoints", point.step).is_dir():
        return bool(entry.get("checkpoint") == _branch_of(point)["checkpoint"])
    return bool(entry["run"] == str(point.run.resolve()))


def _branch(point: BranchPoint, settings: Settings, data: str) -> Start:
    found = checkpoints.at(point.run / "checkpoints", point.step)
    source, here = _settings(found), settings.as_dict()
    own = {f.name for f in dataclasses.fields(Settings)} - set(SHARED)
    if settings.init_from != source.init_from:
        raise UserError(
            f"--init-from: got {settings.init_from}, and a branch starts with the weights of its checkpoint {point.run}"
            f"@{point.step}; give it or --branch-from"
        )
    if changed := difference(here, source.as_dict(), ignored=own):
        raise UserError(f"--branch-from: {point.run} is a run with {changed}; a branch keeps that")
    if data != found.run["data"]:
        raise UserError(f"--branch-from: {point.run} is a run on other data or another tokenizer; give the same")
    if settings.steps <= point.step:
        raise UserError(f"--steps must be more than the {point.step} of --branch-from, got {settings.steps}")
    return Start(found, source, _branch_of(point))


def _settings(found: Checkpoint) -> Settings:
    known = {f.name for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in found.run["settings"].items() if name in known}
    return Settings(**{**values, "model": config_of(values["model"])})


def _of(found: Checkpoint, settings: Settings) -> Settings:
    """`settings` with the end that this checkpoint was made for."""
    end = {name: found.run["settings"][name] for name in END if name in found.run["settings"]}
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.name in END and f.name not in end}
    return dataclasses.replace(settings, **{**defaults, **end})


def _agrees_up_to(found: Checkpoint, settings: Settings) -> bool:
    """Whether a run with `settings` passes through this checkpoint, to the bit."""
    if _step(found) > settings.steps:
        return False
    other, steps = _of(found, settings), range(_completed(found))
    rates = all(settings.learning_rate_at(i) == other.learning_rate_at(i) for i in steps)
    if not rates or any(settings.kind(i) != other.kind(i) for i in steps):
        return False
    depends = settings.rho_schedule == "cosine" and settings.steps != other.steps
    return not depends or all(settings.kind(i) == "plain" for i in steps)


def _set_aside(out: Path, found: Checkpoint, console: Console) -> None:
    """Move the checkpoints after `found`, which this run will not pass through, to a folder that is a run by itself."""
    later = [x for x in checkpoints.folders(out / "checkpoints") if checkpoints.step_of(x) > _step(found)]
    if not later:
        return
    aside = out / f"ended-at-{checkpoints.step_of(later[-1])}"
    numbered = (aside.with_name(f"{aside.name}-{n}") for n in itertools.count(2))
    aside = next(path for path in itertools.chain([aside], numbered) if not path.exists())
    with disk_errors(aside):
        (aside / "checkpoints").mkdir(parents=True)
        for name in ("metrics.jsonl", "config.toml", *pretrained.TOKENIZERS):
            if (out / name).exists():
                shutil.copy2(out / name, aside / name)
        for path in later:
            path.rename(aside / "checkpoints" / path.name)
    console.say(f"its checkpoints after step {_step(found)} are now in {aside}")


def _step(found: Checkpoint) -> int:
    return found.run["progress"]["step"]


def _completed(found: Checkpoint) -> int:
    return found.run["progress"]["step"] - found.run["progress"]["skipped_steps"]
