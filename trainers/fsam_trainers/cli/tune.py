"""`fsam tune`: the best options for a method, with a tuned AdamW beside it."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tyro
from rich.table import Table

from fsam_core import UserError
from fsam_trainers.budget import Budget, measured_costs, within
from fsam_trainers.cli.compare import ComparedIntervals
from fsam_trainers.cli.options import Common, RunIntervals, check_backend, run_alone
from fsam_trainers.cli.variants import VARIED, variant
from fsam_trainers.config import Settings
from fsam_trainers.console import Console, command_line, without
from fsam_trainers.files import write_json
from fsam_trainers.tables import show, show_lines
from fsam_trainers.timing import RelativeCost

COST_STEPS = 12
# Options that AdamW has too, and that do not change the time of a step.
ADAMW = frozenset((
    "learning_rate", "warmup", "learning_rate_schedule", "decay", "decay_shape", "final_learning_rate", "weight_decay",
    "b1", "b2", "eps", "clip_norm", "dropout", "ema", "label_smoothing", "z_loss",
))  # fmt: skip
SAME_TIME = ADAMW | {"rho", "rho_schedule"}
# Options that are not part of the command to train with.
OWN = ("grid", "budget", "method", "out", "json", "config", "learning-rate", "rho")


@dataclass(frozen=True, kw_only=True)
class Tune(Common):
    """Find the best options for a method, and for AdamW beside it, by successive halving over a grid.

    Examples:
        fsam tune --method precond-functional-sam
        fsam tune --grid learning-rate=5e-4,1e-3,2e-3,rho=0.1,0.2 --budget time
    """

    intervals: tyro.conf.OmitArgPrefixes[ComparedIntervals] = field(default_factory=ComparedIntervals)
    grid: str = ""
    """learning-rate=5e-4,1e-3,2e-3,rho=0.1,0.2: values of each option (default: half, once and twice both of these)"""
    budget: Budget = "steps"
    """what is equal for both methods: steps, the time that AdamW takes for --steps, or its FLOPs by the cost model"""
    INTERVALS: ClassVar[type[RunIntervals]] = ComparedIntervals


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    return run_alone(Tune, arguments, "fsam tune", _tune, "the command that it prints")


def _tune(options: Tune, console: Console) -> int:
    from fsam_trainers import tuning

    settings = options.settings()
    asked = _grid(options)
    plans = {name: _axes(options, name, asked) for name in dict.fromkeys(("adamw", settings.method))}
    points = {name: list(_points(axes)) for name, axes in plans.items()}
    firsts = {_cost_key(name, point): _settings(options, name, point) for name in points for point in points[name]}
    out = options.folder(f"tune-{settings.framework}-{options.preset}-{settings.method}")
    check_backend(settings, console)
    corpus = options.load_corpus(settings, console)
    free = ("method", "learning_rate", "rho")
    known = {name: value for name, value in settings.as_dict().items() if name not in free}
    tuning.same_tuning(out, {"settings": known, "data": corpus.fingerprint, "budget": options.budget})
    costs: dict[str, RelativeCost] = dict.fromkeys(firsts, RelativeCost(0.0, 1.0, 1.0, 1.0))
    if options.budget == "time":
        costs = measured_costs(firsts, corpus, out, COST_STEPS, console)
    loss_at = tuning.trainer(corpus, options.intervals_of(settings.steps, usual=0), console, options.recorded())

    def tuned(name: str) -> tuning.Tuned:
        def candidate_of(point: tuning.Values) -> tuning.Candidate:
            cost = costs.get(_cost_key(name, point))
            if cost is None:
                raise UserError(f"--grid: the time of {tuning.text(point)} was not measured")
            one = within(options.budget, _settings(options, name, point), cost)
            folder = "-".join((name, *tuning.text(point).split())).replace("=", "").replace("/", "-").replace(":", "")
            return tuning.Candidate(one, out / folder)

        console.say(f"{name}: {len(points[name])} candidates")
        return tuning.tune(plans[name], candidate_of, loss_at, console)

    found = {name: tuned(name) for name in plans}
    rows = [_row(options, name, one) for name, one in found.items()]
    result = {"command": command_line(), "budget": options.budget, "data": corpus.fingerprint, "rows": rows}
    write_json(out / "tuning.json", result)
    if options.json is not None:
        write_json(options.json, result)
    _print(result, out)
    return 0


def _grid(options: Tune) -> dict[str, list[Any]]:
    """Option -> values, as given.

    Raises:
        UserError: for what is no grid.
    """
    found: dict[str, list[Any]] = {}
    name = ""
    for word in filter(None, (part.strip() for part in options.grid.split(","))):
        option, equals, value = word.rpartition("=")
        name = option.replace("-", "_") if equals else name
        if name not in VARIED:
            known = ", ".join(x.replace("_", "-") for x in VARIED)
            raise UserError(f"--grid: {word!r} is no option=value,value,…; the options are {known}")
        try:
            found.setdefault(name, []).append(float(value))
        except ValueError:
            found.setdefault(name, []).append(value)
    return {option: list(dict.fromkeys(values)) for option, values in found.items()}


def _axes(options: Tune, method: str, asked: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The axes of this method's grid. AdamW has those that it knows, and its learning rate at least."""
    around = lambda x: [x / 2, x, 2 * x]
    rate = {"learning_rate": around(options.run.learning_rate)}
    if method != "adamw":
        axes = asked or {**rate, "rho": around(options.run.rho)}
    else:
        axes = {name: values for name, values in asked.items() if name in ADAMW} or rate
    return {name.replace("_", "-"): values for name, values in axes.items()}


def _points(axes: dict[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    return (tuple(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))


def _settings(options: Tune, method: str, point: Sequence[tuple[str, Any]]) -> Settings:
    own = [f"{name}={value:.12g}" if isinstance(value, float) else f"{name}={value}" for name, value in point]
    return variant(options, ":".join((method, *own)), "--grid")


def _cost_key(method: str, point: Sequence[tuple[str, Any]]) -> str:
    """What the time of a step depends on."""
    own = [f"{name}={value}" for name, value in point if name.replace("-", "_") not in SAME_TIME]
    return ":".join((method, *own))


def _row(options: Tune, method: str, tuned: Any) -> dict[str, Any]:
    """A row of the table, with the command that trains with these values."""
    settings = tuned.candidate.settings
    values = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in tuned.values.items()}
    defaults = {"learning-rate": f"{settings.learning_rate:.6g}"}
    if method != "adamw":
        defaults["rho"] = f"{settings.rho:.6g}"
    # Another budget shortens the warm-up with the run.
    length = {} if options.budget == "steps" else {"steps": settings.steps, "warmup": settings.warmup}
    chosen = {**defaults, **values, **length}
    kept = without(options.arguments, {*OWN, *chosen, *(("tokens-per-param",) if length else ())})
    more = [x for name, value in chosen.items() for x in (f"--{name}", str(value))]
    return {
        "method": method,
        "values": values,
        "val_loss": tuned.loss,
        "steps": settings.steps,
        "run": str(tuned.candidate.folder),
        "train": shlex.join(["fsam", "train", "--method", method, *kept, *more]),
        "tried": tuned.tried,
    }


def _print(result: dict[str, Any], out: Path) -> None:
    table = Table("method", "best values", "validation loss", "steps", "candidates")
    for row in result["rows"]:
        values = " ".join(f"{name}={value}" for name, value in row["values"].items())
        table.add_row(row["method"], values, f"{row['val_loss']:.4f}", f"{row['steps']:,}", str(len(row["tried"])))
    show(table)
    show_lines("One seed each: `fsam compare --seeds` shows whether a difference is one.")
    show_lines(*(row["train"] for row in result["rows"]), f"figures: {out / 'tuning.json'}")
