"""Checkpoints of a run: one folder a step, complete or absent, verified by its list of checksums when read.

OUT/checkpoints/step_00000100/state/      the framework's own format (orbax, torch.distributed.checkpoint)
                              run.json    settings, data, position, seconds so far
                              files.json  size and BLAKE2b of every file above
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core import UserError
from fsam_trainers import processes
from fsam_trainers.files import begin_folder, checksum, disk_errors, is_full, publish, write_json


class Checkpoint(NamedTuple):
    """A valid checkpoint on disk."""

    folder: Path
    run: dict[str, Any]
    """What `seal` was given."""

    @property
    def state(self) -> Path:
        return self.folder / "state"


def begin(root: Path, step: int, size: int) -> tuple[Path, Path]:
    """(temporary folder for the checkpoint of `step`, what it will be called), for about `size` bytes.

    Raises:
        UserError: when the disk refuses.
    """
    target = folder_of(root, step)
    folder = begin_folder(target)
    with disk_errors(target):
        free = shutil.disk_usage(folder).free
    # Checked first: the frameworks' writers report a full disk late, at length and each differently.
    if free < size:
        shutil.rmtree(folder)
        raise UserError(
            f"cannot write {target}: it takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "nothing was left half-written"
        )
    return folder, target


def seal(folder: Path, target: Path, run: dict[str, Any], keep: int) -> None:
    """Make a folder that holds the whole state a valid checkpoint, then drop all but the newest `keep`.

    The one at `run["kept_step"]`, if there is such an entry, stays as well.

    Raises:
        UserError: when the disk refuses; older checkpoints stay.
    """
    with disk_errors(target):
        write_json(folder / "run.json", run)
        write_json(folder / "files.json", {name: list(entry) for name, entry in _entries(folder).items()})
        publish(folder, target)
        for old in folders(target.parent)[:-keep]:
            if old != folder_of(target.parent, run.get("kept_step", -1)):
                shutil.rmtree(old)


@contextlib.contextmanager
def as_user_error(target: Path) -> Iterator[None]:
    """Turn what a framework raises while it writes `target` into a UserError; the error of a lost rank is kept."""
    try:
        with disk_errors(target):
            yield
    except UserError:
        raise
    except Exception as error:
        if processes.is_lost(error):
            raise
        full = any(text in str(error) for text in ("No space left", "File too large", "Disk quota exceeded"))
        # PyTorch hides the disk's error behind its own: "enforce fail … unexpected pos".
        full = full or any(is_full(one) for one in _behind(error)) or shutil.disk_usage(target.parent).free < 2**20
        reason = "no space left for it" if full else _first_line(error)
        raise UserError(f"cannot write {target}: {reason}; nothing was left half-written") from error


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, None if there are no checkpoints; warns about each damaged one before it.

    Raises:
        UserError: when there are checkpoints and every one is damaged.
    """
    found = next(intact(root, warn), None)
    if found is None and (every := folders(root)):
        raise UserError(
            f"--out: no checkpoint in {root} is whole (the newest: {_damage(every[-1])}); delete the folder to start "
            "again, or give another --out"
        )
    return found


def intact(root: Path, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The intact checkpoints, the newest first; warns about each damaged one."""
    for folder in reversed(folders(root)):
        if damage := _damage(folder):
            warn(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
        else:
            yield _read(folder)


def at(root: Path, step: int) -> Checkpoint:
    """The checkpoint of this step.

    Raises:
        UserError: when there is none, with the steps that there are, or it is damaged.
    """
    folder = folder_of(root, step)
    if not folder.is_dir():
        steps = ", ".join(str(step_of(path)) for path in folders(root)) or "none"
        raise UserError(f"{root} holds no checkpoint of step {step}; there are: {steps}")
    if damage := _damage(folder):
        raise UserError(f"checkpoint {folder} is damaged: {damage}")
    return _read(folder)


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of this step is, or would be."""
    return root / f"step_{step:08d}"


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(folder, json.loads((folder / "run.json").read_text(encoding="utf-8")))


def folders(root: Path) -> list[Path]:
    """Every checkpoint's folder, the oldest first, whole or not. What has another name is the user's."""
    found = (path for path in root.glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def last_known(root: Path) -> dict[str, Any] | None:
    """What `seal` was given for the newest checkpoint that says so; None if none does.

    Nothing is verified: that would read every byte.
    """
    for folder in reversed(folders(root)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if (run := _read(folder).run)["settings"]:
                return run
    return None


def _entries(folder: Path) -> dict[str, tuple[int, str]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "files.json")
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, checksum(p)) for p in paths}


def _damage(folder: Path) -> str:
    try:
        listed = {k: tuple(v) for k, v in json.loads((folder / "files.json").read_text(encoding="utf-8")).items()}
        found = _entries(folder)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"files.json cannot be read: {_first_line(error)}"
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    return f"{wrong[0]} is not what was written" if wrong else ""


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The chain of errors that caused this one."""
    while error and (error := error.__cause__ or error.__context__):
        yield error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
