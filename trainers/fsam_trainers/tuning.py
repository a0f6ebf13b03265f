"""The best values of a few options for one method: a grid, by successive halving, extended where its edge is best.

Every candidate is a run of the full length that is paused at a quarter and at half of it; of the candidates at each
pause the better half resumes. A value at the edge of its axis may not be the best: the axis is extended beyond it until
the best is inside. Losses at a pause are those of unfinished schedules, which favour lower learning rates; half of the
candidates is kept, and not fewer, for that reason.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core import UserError
from fsam_trainers import metrics
from fsam_trainers.checkpoints import last_known
from fsam_trainers.config import Intervals, Settings, difference
from fsam_trainers.console import Console
from fsam_trainers.data import AnyCorpus
from fsam_trainers.files import write_json
from fsam_trainers.loop import train
from fsam_trainers.processes import Stopped
from fsam_trainers.resuming import begun_of

# An axis whose best value is its first or last is extended beyond it, up to this many values.
MOST_VALUES = 7
PAUSES = (4, 2)  # shares of a run: 1/4, 1/2

Value = float | str
Values = tuple[tuple[str, Value], ...]
"""An option's name and value, for each axis."""


class Candidate(NamedTuple):
    """One point of the grid: its settings at full length, and where it is trained."""

    settings: Settings
    folder: Path


class Tuned(NamedTuple):
    """The best point of a grid."""

    values: dict[str, Value]
    loss: float
    candidate: Candidate
    tried: list[dict[str, Any]]
    """Of every candidate its values, and its validation loss by step."""


def beyond(values: Sequence[float], best: float) -> float | None:
    """The next value of a geometric axis beyond its end, if `best` is that end; None if it is inside."""
    values = sorted(values)
    if len(values) < 2 or values[0] <= 0:
        return None
    return {values[0]: values[0] ** 2 / values[1], values[-1]: values[-1] ** 2 / values[-2]}.get(best)


def sweep(
    values: Sequence[float], losses_of: Callable[[Sequence[float]], Mapping[float, float]], below: float = math.inf
) -> tuple[float, Mapping[float, float]]:
    """The best value of one axis and the losses of all, extended where its edge is best, but not to `below`."""
    while True:
        losses = losses_of(values)
        chosen = min(losses, key=lambda value: losses[value])
        wider = beyond(values, chosen)
        if wider is None or len(values) >= MOST_VALUES or wider >= below:
            return chosen, losses
        values = tuple(sorted((*values, wider)))


def tune(
    grid: Mapping[str, Sequence[Value]],
    candidate_of: Callable[[Values], Candidate],
    loss_at: Callable[[Candidate, int], float],
    console: Console,
) -> Tuned:
    """The best point of `grid`, and of what it was extended by.

    Args:
        grid: option -> its values; numbers above 0 make an axis that is extended.
        candidate_of: a point as a run.
        loss_at: trains a candidate up to this step; its validation loss there, infinite if it has diverged.

    Raises:
        UserError: for a point that is no run, and when every candidate has diverged.
    """
    axes = {name: list(values) for name, values in grid.items()}
    points = [tuple(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    candidates = {point: candidate_of(point) for point in points}
    losses: dict[Values, dict[int, float]] = {point: {} for point in points}

    def trained(point: Values, parts: int) -> float:
        one = candidates[point]
        step = math.ceil(one.settings.steps / parts)
        losses.setdefault(point, {})[step] = loss = loss_at(one, step)
        console.say(f"step {step}, {text(point)}: {loss:.4f}")
        return loss

    going = points
    for parts in PAUSES:
        if len(going) > 2:
            ranked = sorted(going, key=lambda point, parts=parts: trained(point, parts))  # type: ignore[misc]
            going = ranked[: math.ceil(len(ranked) / 2)]
    at_end = {point: trained(point, 1) for point in going}
    while True:
        best = min(at_end, key=lambda point: at_end[point])
        if not math.isfinite(at_end[best]):
            raise UserError("--grid: every candidate has diverged; give lower learning rates")
        wider = _wider(axes, best, candidate_of)
        for point, candidate in wider.items():
            candidates[point] = candidate
            at_end[point] = trained(point, 1)
        if not wider:
            tried = [{"values": dict(point), "losses": found} for point, found in losses.items()]
            return Tuned(dict(best), at_end[best], candidates[best], tried)


def _wider(
    axes: dict[str, list[Value]], best: Values, candidate_of: Callable[[Values], Candidate]
) -> dict[Values, Candidate]:
    """Points beyond the axes at whose end the best is; the axes are extended."""
    found = {}
    for name, value in best:
        numbers = [x for x in axes[name] if isinstance(x, float)]
        if len(numbers) != len(axes[name]) or len(numbers) >= MOST_VALUES or not isinstance(value, float):
            continue
        if (wider := beyond(numbers, value)) is not None:
            point = tuple((other, wider if other == name else x) for other, x in best)
            try:
                found[point] = candidate_of(point)
            except UserError:  # dropout of 1, say: the axis ends here
                continue
            axes[name].append(wider)
    return found


def text(point: Values) -> str:
    """learning-rate=0.001 rho=0.1"""
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in point)


def trainer(
    corpus: AnyCorpus, intervals: Intervals, console: Console, options: Mapping[str, Any]
) -> Callable[[Candidate, int], float]:
    """The `loss_at` of `tune` for real runs. What is in metrics.jsonl already is not trained again.

    Raises:
        Stopped: when a signal has stopped the run; the next call resumes it.
        UserError: where the folder of a candidate holds a run with other settings, and as `loop.train`.
    """

    def loss_at(one: Candidate, step: int) -> float:
        # A folder's name has the axes alone; `train` refuses a run in which something else differs.
        known = last_known(one.folder / "checkpoints")
        unused = ("rho",) if one.settings.method == "adamw" else ()
        found = None
        if known is not None and known.get("begun") == begun_of(one.settings):
            ignored = (*unused, "init_from")  # whose weights are what is compared
            same = not difference(one.settings.as_dict(), known["settings"], ignored)
            found = _evaluated(one.folder, step) if same else None
        if found is None:
            figures = train(one.settings, corpus, one.folder, intervals, console, until=step, options=options)
            if figures["status"] == "stopped":
                raise Stopped(figures["signal"])
            found = _evaluated(one.folder, step)
        return math.inf if found is None or not math.isfinite(found) else found

    return loss_at


def _evaluated(folder: Path, step: int) -> float | None:
    """The validation loss that the metrics hold for this step, NaN if it was not finite; None without such a line."""
    lines = metrics.read(folder / "metrics.jsonl")
    found = [x["val_loss"] for x in lines if x["step"] == step and "val_loss" in x]
    return None if not found else math.nan if found[-1] is None else found[-1]


def same_tuning(out: Path, asked: dict[str, Any]) -> None:
    """Check that the candidates in `out` are of the same settings and data, and note them in a new folder.

    Raises:
        UserError: when they are not.
    """
    path = out / "asked.json"
    if not path.exists():
        write_json(path, asked)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(asked)):
        raise UserError(f"--out: {out} holds a tuning with other settings or data; give the same, or another --out")
