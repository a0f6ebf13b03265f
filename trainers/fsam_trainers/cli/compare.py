"""`fsam compare`: several methods on the same data and budget."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from fsam_core import UserError
from fsam_trainers.cli.config_file import read
from fsam_trainers.cli.options import Branching, RunIntervals, RunOptions, check_backend, parse, run_alone
from fsam_trainers.cli.variants import variants
from fsam_trainers.config import Settings
from fsam_trainers.console import Console, command_line
from fsam_trainers.files import write_json
from fsam_trainers.tables import show, show_lines


@dataclass(frozen=True)
class ComparedOptions(RunOptions):
    """`RunOptions` without --method and --seed, which --methods and --seeds replace."""

    method: tyro.conf.Suppress[str]
    seed: tyro.conf.Suppress[int] = 0


@dataclass(frozen=True)
class ComparedIntervals(RunIntervals):
    """`RunIntervals` without --probe-steps: AdamW is timed once, before the first run."""

    probe_steps: tyro.conf.Suppress[int] = 0


@dataclass(frozen=True, kw_only=True)
class Compare(Branching):
    """Train several methods on the same data and budget: one table, one plot, one HTML report.

    Examples:
        fsam compare
        fsam compare --methods adamw,sam:rho=0.1,precond-functional-sam --seeds 3
        fsam compare --methods adamw,precond-functional-sam:correction-fraction=1/4 --budget time
    """

    run: tyro.conf.OmitArgPrefixes[ComparedOptions]
    """what determines the result"""
    intervals: tyro.conf.OmitArgPrefixes[ComparedIntervals] = field(default_factory=ComparedIntervals)
    methods: str = "adamw,precond-functional-sam"
    """names as in `fsam train --method`, between commas, with options of their own if any: sam:rho=0.1:start=0.5"""
    budget: Literal["steps", "time", "flops"] = "steps"
    """what is equal for all: optimizer steps, the time that AdamW takes for --steps, or its FLOPs by the cost model"""
    seeds: int = 1
    """runs of each method, with seeds 0, 1, …; of a branch one, with its base's"""
    cost_steps: int = 12
    """steps of each method timed interleaved, for the cost ratio"""
    RUN: ClassVar[type[RunOptions]] = ComparedOptions
    INTERVALS: ClassVar[type[RunIntervals]] = ComparedIntervals


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    return run_alone(Compare, arguments, "fsam compare", _compare, "one `fsam train` after the other")


def _compare(options: Compare, console: Console) -> int:
    from fsam_trainers.compare import compare

    chosen = variants(options, options.methods)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    if options.cost_steps < 10:
        raise UserError(f"--cost-steps must be at least 10 for a median worth printing, got {options.cost_steps}")
    start = options.start()
    if start is not None:
        if options.seeds != 1 or options.budget != "steps":
            raise UserError("--branch-from takes --seeds 1, the base run's own, and --budget steps")
        seed = read(start.run / "config.toml").get("seed", 0)
        chosen = {name: dataclasses.replace(one, seed=seed) for name, one in chosen.items()}
    settings = next(iter(chosen.values()))
    intervals = options.intervals_of(settings.steps)
    out = options.folder(f"compare-{settings.framework}-{options.preset}")
    check_backend(settings, console)
    corpus = options.load_corpus(settings, console)
    comparison = compare(
        chosen,
        corpus,
        out,
        intervals,
        console,
        budget=options.budget,
        seeds=options.seeds,
        cost_steps=options.cost_steps,
        command=command_line(),
        options=options.recorded(),
        changed=_changed(options, settings),
        branch_from=start,
    )
    if options.json is not None:
        write_json(options.json, comparison)
    _print(comparison, out)
    diverged = [run["out"] for run in comparison["runs"] if run["status"] == "diverged"]
    if diverged:
        print(f"fsam: error: {len(diverged)} of the runs diverged: {', '.join(diverged)}", file=sys.stderr)
    return 1 if diverged else 0


def _print(comparison: dict[str, Any], out: Path) -> None:
    table = Table(title=comparison["title"])
    for column in comparison["columns"]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in comparison["rows"]:
        table.add_row(*map(escape, row["cells"]))
    show(table)
    show_lines("", *comparison["notes"], "")
    for label, name in (("plot", "plot.png"), ("report", "report.html"), ("figures", "comparison.json")):
        show_lines(f"{label}: {out / name}")
    show_lines("", "What to try next:")
    for what, command in comparison["next"]:
        show_lines(f"  {what}:", f"    {command}")


def _changed(options: Compare, settings: Settings) -> dict[str, Any]:
    """The settings in which this comparison is not the preset's, without what each method sets for itself."""
    of_preset = parse(Compare, ("--task", options.task, "--preset", str(options.preset)), "fsam compare")
    usual = dataclasses.replace(of_preset, corpus=options.corpus).settings(method=settings.method)
    mine, theirs = (
        {**one.pop("model"), **one} for one in (options.settings(method=settings.method).as_dict(), usual.as_dict())
    )
    follows = {"warmup"} - options.given  # it follows from --steps
    return {name: value for name, value in mine.items() if value != theirs.get(name) and name not in follows}
