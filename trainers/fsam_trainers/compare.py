"""Several methods on the same data and budget, several seeds each: runs, table, plot and report."""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fsam_trainers import metrics, timing
from fsam_trainers.budget import Budget, measured_costs, within
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console, without
from fsam_trainers.data import AnyCorpus
from fsam_trainers.files import write_json
from fsam_trainers.loop import train
from fsam_trainers.processes import Stopped
from fsam_trainers.report import write_plot, write_report
from fsam_trainers.resuming import BranchPoint
from fsam_trainers.samples import written

COLUMNS = (
    "method",
    "validation loss",
    "vs first",
    "best (step)",
    "x AdamW",
    "loss at equal time",
    "train loss",
    "steps",
    "ms/step",
    "seconds",
    "skipped",
)


def compare(
    variants: Mapping[str, Settings],
    corpus: AnyCorpus,
    out: Path,
    intervals: Intervals,
    console: Console,
    *,
    budget: Budget,
    seeds: int,
    cost_steps: int,
    command: str,
    options: Mapping[str, Any] | None = None,
    changed: Mapping[str, Any] | None = None,
    branch_from: BranchPoint | None = None,
) -> dict[str, Any]:
    """Train every variant with every seed under `out`, then write comparison.json, plot.png and report.html there.

    Finished runs are reused and an interrupted one is resumed. With budget "time" each variant gets as many steps as
    fit into AdamW's time, by the cost ratio measured first; with "flops" as many as fit into its matrix products, by
    the cost model. `options` and `branch_from` are as in `loop.train`; `changed` are the settings that are not the
    preset's, for the report.

    Returns:
        What comparison.json holds.

    Raises:
        Stopped: when a signal has stopped a run.
        UserError: as `loop.train`.
    """
    settings = next(iter(variants.values()))
    costs = measured_costs(variants, corpus, out, cost_steps, console)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in variants}
    for seed in range(settings.seed, settings.seed + seeds):
        for name, variant in variants.items():
            one = dataclasses.replace(within(budget, variant, costs[name]), seed=seed)
            share = one.steps / variant.steps
            every = dataclasses.replace(
                intervals,
                evaluate_every=round(intervals.evaluate_every * share) or intervals.evaluate_every,
                checkpoint_every=round(intervals.checkpoint_every * share) or intervals.checkpoint_every,
            )
            folder = out / f"{file_name(name)}-seed{seed}"
            console.say(f"{name}, seed {seed}: {one.steps} steps")
            ms = costs["adamw"].step_ms
            figures = train(one, corpus, folder, every, console, ms, options=options, branch_from=branch_from)
            if figures["status"] == "stopped":
                raise Stopped(figures["signal"])
            runs[name].append(figures)
            curves[name].append(metrics.read(folder / "metrics.jsonl"))
    comparison = _summary(settings, runs, curves, costs, corpus, budget, seeds, cost_steps, command)
    comparison |= {"changed": dict(changed or {}), "next": _next(comparison, settings, out, branch_from is not None)}
    write_json(out / "comparison.json", comparison)
    write_plot(out / "plot.png", curves, {name: costs[name].step_ms for name in curves})
    # One that has diverged writes nothing, and may have no checkpoint.
    of_first_seed = {name: Path(of[0]["out"]) for name, of in runs.items() if _losses(of)[0] < math.inf}
    write_report(out / "report.html", comparison, curves, written(settings, corpus, of_first_seed))
    return comparison


def file_name(variant: str) -> str:
    """A variant's name as that of a folder."""
    return variant.replace(":", "_").replace("=", "").replace("/", "-")


def _summary(
    settings: Settings,
    runs: dict[str, list[dict[str, Any]]],
    curves: dict[str, list[list[dict[str, Any]]]],
    costs: dict[str, timing.RelativeCost],
    corpus: AnyCorpus,
    budget: str,
    seeds: int,
    cost_steps: int,
    command: str,
) -> dict[str, Any]:
    rows = []
    # Where the fastest of the runs ends, on the time axis of the plots.
    seconds = min(costs[name].step_ms * of[0]["steps"] for name, of in runs.items()) / 1000
    first = _losses(next(iter(runs.values())))
    for method, of in runs.items():
        losses = _losses(of)
        mine = costs[method]
        none = [{"step": of[0]["steps"], "val_loss": math.inf}]  # no evaluation was finite
        held_out = [[x for x in lines if x.get("val_loss") is not None] or none for lines in curves[method]]
        best = [min(lines, key=lambda x: x["val_loss"]) for lines in held_out]
        row = {
            "method": method,
            "val_loss_mean": statistics.fmean(losses),
            "val_loss_spread": statistics.stdev(losses) if len(losses) > 1 and max(losses) < math.inf else None,
            "val_losses": losses,
            # Paired by seed: the variance that the seeds share does not hide the difference.
            "difference": statistics.fmean(a - b for a, b in zip(losses, first, strict=True)),
            "best_val_loss_mean": statistics.fmean(x["val_loss"] for x in best),
            "best_steps": [x["step"] for x in best],
            "train_loss_mean": statistics.fmean(_losses(of, "train_loss")),
            "steps": of[0]["steps"],
            "seconds_mean": statistics.fmean(run["seconds"] for run in of),
            "skipped_steps": sum(run["skipped_steps"] for run in of),
            "cost": mine._asdict(),
            "val_loss_at_equal_time": statistics.fmean(
                np.interp(1000 * seconds / mine.step_ms, [x["step"] for x in lines], [x["val_loss"] for x in lines])
                for lines in held_out
            ),
        }
        spread = f" ± {row['val_loss_spread']:.4f}" if row["val_loss_spread"] is not None else ""
        accuracies = [run["val_accuracy"] for run in of if "val_accuracy" in run]
        if accuracies:
            row |= {"val_accuracies": accuracies, "val_accuracy_mean": statistics.fmean(accuracies)}
        row["cells"] = [
            method,
            f"{row['val_loss_mean']:.4f}{spread}",
            f"{row['difference']:+.4f}" if method != next(iter(runs)) else "",
            *([f"{row['val_accuracy_mean']:.2%}"] if accuracies else []),
            f"{row['best_val_loss_mean']:.4f} ({round(statistics.fmean(row['best_steps'])):,})",
            f"{mine.ratio:.2f} ({mine.ratio_p20:.2f}–{mine.ratio_p80:.2f})" if method != "adamw" else "1",
            f"{row['val_loss_at_equal_time']:.4f}",
            f"{row['train_loss_mean']:.4f}",
            f"{row['steps']:,}",
            f"{mine.step_ms:,.0f}",
            f"{row['seconds_mean']:,.1f}",
            f"{row['skipped_steps'] or ''}",
        ]
        rows.append(row)
    any_run = next(iter(runs.values()))[0]
    of_images = "val_accuracy" in any_run
    unit = "an image" if of_images else "a token"
    spread_note = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: a lead, not a result"
    return {
        "title": f"{any_run['params']:,} parameters, {any_run['framework']}/{any_run['backend']} on "
        f"{any_run['device']}, equal {budget}",
        "columns": (*COLUMNS[:3], *(["accuracy"] if of_images else []), *COLUMNS[3:]),
        "rows": rows,
        "notes": [
            corpus.description,
            f"Validation loss at the end, in nats {unit}, {spread_note}; 'vs first' is paired by seed.",
            "Best: the lowest evaluation of each run, and the step it was at.",
            f"Loss at equal time: between the evaluations around {seconds:,.0f} s of steps, when the fastest run ends; "
            "the learning rates of the others have not decayed by then. --budget time trains all for that long.",
            "Seconds in training steps alone, without compilation, evaluation and checkpoints.",
            f"x AdamW: median of {cost_steps} steps of each method, interleaved in one process, "
            "with the 20th and 80th percentile.",
        ],
        "budget": budget,
        "seeds": seeds,
        "command": command,
        "settings": {k: v for k, v in settings.as_dict().items() if k not in ("method", "seed")},
        "data": any_run["data"],
        "runs": [run for of in runs.values() for run in of],
    }


def _losses(runs: list[dict[str, Any]], name: str = "val_loss") -> list[float]:
    """Of runs with different seeds; infinite for one that has diverged, and has none."""
    found = (run[name] for run in runs)
    return [math.inf if loss is None or math.isnan(loss) else loss for loss in found]


def _next(comparison: dict[str, Any], settings: Settings, out: Path, of_branches: bool) -> list[tuple[str, str]]:
    """(what it would show, command) of what to try after this comparison."""
    rows, words = comparison["rows"], shlex.split(comparison["command"])
    ours = min((row for row in rows if row["method"] != "adamw"), key=lambda row: row["val_loss_mean"], default=rows[0])
    name, best = ours["method"], min(rows, key=lambda row: row["val_loss_mean"])["method"]
    runs = [shlex.quote(str(out / f"{file_name(one)}-seed{settings.seed}")) for one in dict.fromkeys((best, name))]
    found = []
    if comparison["seeds"] == 1 and not of_branches:  # which have one seed and equal steps, and are not tuned
        found.append(("whether the differences are more than a seed's", f"{comparison['command']} --seeds 3"))
    if comparison["budget"] == "steps" and len(rows) > 1 and not of_branches:
        again = without(words, ("out", "budget"))
        found.append(
            ("all methods for the same time", shlex.join([*again, "--budget", "time", "--out", f"{out}-time"]))
        )
    if not of_branches:
        method, *own = name.split(":")
        same = without(words, ("out", "json", "methods", "seeds", "cost-steps", "correction-every"))[2:]
        for option, _, value in (one.partition("=") for one in own):
            same += [f"--{option}", value] if option not in ("learning-rate", "rho") else []
        tune = shlex.join(["fsam", "tune", "--method", method, *same])
        found.append(("the best learning rate and ρ, AdamW's too", tune))
    is_text = settings.model.FAMILY == "decoder"
    if is_text:
        found.append(("what the best model writes", f"fsam sample {runs[0]}"))
    found.append(("what became flatter", f"fsam sharpness {' '.join(runs)}"))
    return found
