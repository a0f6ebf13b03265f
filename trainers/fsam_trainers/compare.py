"""Several methods on the same data and budget, several seeds each: runs, table, plot and report."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fsam_trainers import metrics, timing
from fsam_trainers.budget import Budget, measured_costs, within
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.data import Corpus, StreamedCorpus
from fsam_trainers.files import write_json
from fsam_trainers.loop import train
from fsam_trainers.report import write_plot, write_report
from fsam_trainers.resuming import BranchPoint

COLUMNS = (
    "method",
    "validation loss",
    "vs first",
    "best (step)",
    "train loss",
    "steps",
    "seconds",
    "ms/step",
    "x AdamW",
    "skipped",
)


def compare(
    variants: Mapping[str, Settings],
    corpus: Corpus | StreamedCorpus,
    out: Path,
    intervals: Intervals,
    console: Console,
    *,
    budget: Budget,
    seeds: int,
    cost_steps: int,
    command: str,
    options: Mapping[str, Any] | None = None,
    branch_from: BranchPoint | None = None,
) -> dict[str, Any] | None:
    """Train every variant with every seed under `out`, then write comparison.json, plot.png and report.html there.

    Finished runs are reused and an interrupted one is resumed. With budget "time" each variant gets as many steps as
    fit into AdamW's time, by the cost ratio measured first; with "flops" as many as fit into its matrix products, by
    the cost model. `options` and `branch_from` are as in `loop.train`.

    Returns:
        What comparison.json holds; None when a signal stopped it.

    Raises:
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
                return None
            runs[name].append(figures)
            curves[name].append(metrics.read(folder / "metrics.jsonl"))
    comparison = _summary(settings, runs, curves, costs, corpus, budget, seeds, cost_steps, command)
    write_json(out / "comparison.json", comparison)
    write_plot(out / "plot.png", curves)
    write_report(out / "report.html", comparison, out / "plot.png")
    return comparison


def file_name(variant: str) -> str:
    """A variant's name as that of a folder."""
    return variant.replace(":", "_").replace("=", "").replace("/", "-")


def _summary(
    settings: Settings,
    runs: dict[str, list[dict[str, Any]]],
    curves: dict[str, list[list[dict[str, Any]]]],
    costs: dict[str, timing.RelativeCost],
    corpus: Corpus | StreamedCorpus,
    budget: str,
    seeds: int,
    cost_steps: int,
    command: str,
) -> dict[str, Any]:
    rows = []
    first = [run["val_loss"] for run in next(iter(runs.values()))]
    for method, of in runs.items():
        losses = [run["val_loss"] for run in of]
        mine = costs[method]
        held_out = [[x for x in lines if x.get("val_loss") is not None] for lines in curves[method]]
        best = [min(lines, key=lambda x: x["val_loss"]) for lines in held_out]
        row = {
            "method": method,
            "val_loss_mean": statistics.fmean(losses),
            "val_loss_spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "val_losses": losses,
            # Paired by seed: the variance that the seeds share does not hide the difference.
            "difference": statistics.fmean(np.subtract(losses, first)) if losses is not first else 0.0,
            "best_val_loss_mean": statistics.fmean(x["val_loss"] for x in best),
            "best_steps": [x["step"] for x in best],
            "train_loss_mean": statistics.fmean(run["train_loss"] for run in of),
            "steps": of[0]["steps"],
            "seconds_mean": statistics.fmean(run["seconds"] for run in of),
            "skipped_steps": sum(run["skipped_steps"] for run in of),
            "cost": mine._asdict(),
        }
        spread = f" ± {row['val_loss_spread']:.4f}" if row["val_loss_spread"] is not None else ""
        row["cells"] = [
            method,
            f"{row['val_loss_mean']:.4f}{spread}",
            f"{row['difference']:+.4f}" if method != next(iter(runs)) else "",
            f"{row['best_val_loss_mean']:.4f} ({round(statistics.fmean(row['best_steps'])):,})",
            f"{row['train_loss_mean']:.4f}",
            f"{row['steps']:,}",
            f"{row['seconds_mean']:,.1f}",
            f"{mine.step_ms:,.0f}",
            f"{mine.ratio:.2f} ({mine.ratio_p20:.2f}–{mine.ratio_p80:.2f})" if method != "adamw" else "1",
            f"{row['skipped_steps']}",
        ]
        rows.append(row)
    any_run = next(iter(runs.values()))[0]
    spread_note = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: a lead, not a result"
    return {
        "title": f"{any_run['params']:,} parameters, {any_run['framework']}/{any_run['backend']} on "
        f"{any_run['device']}, equal {budget}",
        "columns": COLUMNS,
        "rows": rows,
        "notes": [
            corpus.description,
            f"Validation loss at the end, in nats a token, {spread_note}; 'vs first' is paired by seed.",
            "Best: the lowest evaluation of each run, and the step it was at.",
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
