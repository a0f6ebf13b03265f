"""`fsam runs`: a table of the runs below a folder."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from fsam_core import UserError
from fsam_trainers import checkpoints, metrics
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.files import writable, write_json
from fsam_trainers.models.vit_layout import config_of
from fsam_trainers.tables import show, show_lines

COLUMNS = ("run", "method", "framework", "params", "seed", "step", "train", "val", "saved")


@dataclass(frozen=True)
class Runs:
    """The runs below a folder: how far each is, and its losses.

    Examples:
        fsam runs
        fsam runs runs/compare-jax-tiny --json runs.json
    """

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """where to look, in folders of folders too"""
    json: Path | None = None
    """also write the table here"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Runs, arguments, "fsam runs")
    if not options.folder.is_dir():
        raise UserError(f"FOLDER: {options.folder} is no folder; give one that holds runs")
    if options.json is not None:
        writable("--json", options.json)
    rows = [row_of(run, options.folder) for run in found(options.folder)]
    if options.json is not None:
        write_json(options.json, rows)
    table = Table(*COLUMNS)
    for row in rows:
        step = f"{row['step']:,} of {row['steps']:,}" if row["steps"] else "no readable checkpoint"
        losses = ["–" if row[name] is None else f"{row[name]:.4f}" for name in ("train_loss", "val_loss")]
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["saved"])) if row["saved"] else "–"
        texts = (row["run"], row["method"], row["framework"])
        params = f"{row['params']:,}" if row["params"] else "–"
        seed = "–" if row["seed"] is None else str(row["seed"])
        table.add_row(*(escape(text or "–") for text in texts), params, seed, step, *losses, saved)
    if rows:
        show(table)
    else:
        show_lines(f"no runs in {options.folder}")
    return 0


def found(folder: Path) -> Iterator[Path]:
    """The folders of runs, sorted; a run's own checkpoints are not searched."""
    for parent, folders, _ in os.walk(folder):
        if "checkpoints" in folders:
            yield Path(parent)
        folders[:] = sorted(name for name in folders if name != "checkpoints" and not name.startswith("."))


def row_of(run: Path, below: Path) -> dict[str, Any]:
    """What a run's newest checkpoint that can be read and its metrics say; None for what they do not."""
    names = ("method", "framework", "params", "seed", "step", "steps", "train_loss", "val_loss", "saved")
    row: dict[str, Any] = {"run": str(run.relative_to(below)), **dict.fromkeys(names)}
    # Not verified: that would read every byte of every checkpoint.
    for folder in reversed(checkpoints.folders(run / "checkpoints")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row |= _described(folder / "run.json")
            break
    losses: list[float] = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        losses = [float(x["loss"]) for x in metrics.read(run / "metrics.jsonl") if x.get("loss") is not None][-20:]
    return row | {"train_loss": statistics.fmean(losses) if losses else None}


def _described(file: Path) -> dict[str, Any]:
    """The part of a row that a checkpoint's run.json has."""
    described = json.loads(file.read_text(encoding="utf-8"))
    settings, progress = described["settings"], described["progress"]
    return {
        **{name: settings[name] for name in ("method", "framework", "seed", "steps")},
        "params": config_of(settings["model"]).parameters,
        "step": progress["step"],
        "val_loss": None if progress["val_loss"] is None else float(progress["val_loss"]),
        "saved": file.stat().st_mtime,
    }
