"""One self-contained HTML page from what `--json` wrote: `fsam profile report FILE… --out report.html`.

Each section names the command and the machine that made it, and says whose figures they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fsam_core import UserError
from fsam_profiling import results
from fsam_trainers import page
from fsam_trainers.files import writable, write_text

# The order of the sections.
KINDS = (
    "step",
    "trace",
    "parameters",
    "tpu step",
    "tpu head",
    "tpu parameters",
    "tpu scale",
    "gpu step",
    "gpu head",
    "gpu parameters",
    "check",
)
TITLES = {
    "step": "Step time on this machine",
    "trace": "Where the time of a step goes",
    "parameters": "Parameter work on this machine",
    "tpu step": "Whole steps on a TPU, by its compiler",
    "tpu head": "The head on a TPU, by its compiler",
    "tpu parameters": "Parameter work on a TPU, by its compiler",
    "tpu scale": "Steps sharded over a TPU's chips, by its compiler",
    "gpu step": "The Triton kernels of whole steps, by the GPUs' compilers",
    "gpu head": "The head's Triton kernels, by the GPUs' compilers",
    "gpu parameters": "The parameters' Triton kernels, by the GPUs' compilers",
    "check": "Figures of the regression guard",
}


@dataclass(frozen=True)
class ReportOptions:
    """Gather files that --json wrote into one HTML page with tables and pictures."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """files that `fsam profile … --json` wrote"""
    out: Path = Path("profile.html")
    """the page"""
    title: str = "fsam profile"
    """its heading"""
    json: Path | None = None
    """also write the tables of the page here"""


def run(options: ReportOptions) -> int:
    """Write the page; 0.

    Raises:
        UserError: for no files, one that is not of `fsam profile`, or a missing package.
    """
    if not options.files:
        raise UserError("report: no files given; give some that --json of fsam profile wrote")
    writable("--out", options.out)
    found = [results.read(path) for path in options.files]
    order = {kind: i for i, kind in enumerate(KINDS)}
    found.sort(key=lambda file: order.get(file["kind"], len(order)))
    sections = [section(file) for file in found]
    write_text(options.out, page.render(options.title, sections))
    if options.json is not None:
        tables = [
            {"kind": file["kind"], "title": one.title, "command": one.command, "facts": one.facts}
            | {"headings": one.headings, "cells": one.cells, "notes": one.notes}
            for file, one in zip(found, sections, strict=True)
        ]
        results.write(options.json, "report", tables)
    print(f"report: {options.out}")
    return 0


def section(file: dict[str, Any]) -> page.Section:
    """The section of one file."""
    from fsam_profiling import report_tables

    kind, rows = file["kind"], file["rows"]
    headings, cells = report_tables.table(kind, rows)
    facts = {name: _plain(value) for name, value in file["about"].items() if value is not None}
    machine = ", ".join(f"{name} {value}" for name, value in file["machine"].items())
    return page.Section(
        TITLES.get(kind, kind),
        headings,
        cells,
        file["command"],
        facts=facts | {"machine": machine},
        pictures=pictures(kind, rows),
        notes=report_tables.NOTES.get(kind, ()),
        words=("saving", "saving or peer"),
    )


def pictures(kind: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG) of each picture of the rows."""
    from fsam_profiling import report_plots

    found = []
    label = lambda row: " ".join(
        str(row[name]) for name in ("framework", "method", "saving", "backend") if row.get(name)
    )
    unit, scale = ("million cycles", 1e-6) if kind == "tpu step" else ("milliseconds", 1.0)
    for framework in dict.fromkeys(row.get("framework") for row in rows):
        held = [row for row in rows if row.get("regions") and row.get("framework") == framework]
        which = lambda row: row.get("scheduled_regions") or row["regions"]
        parts = [{name: scale * value for name, value in which(row).items()} for row in held]
        if held:
            found.append(("A step by region", report_plots.regions([label(row) for row in held], parts, unit)))
    if kind == "step":
        spread = [(row["ratio_p20"], row["ratio"], row["ratio_p80"]) for row in rows]
        found.append(
            (
                "Ratio to AdamW of the same framework: median, 20th to 80th percentile",
                report_plots.ratios([label(row) for row in rows], spread),
            )
        )
    if kind in ("step", "tpu step") and (series := report_plots.by_fraction(rows)):
        found.append(("Ratio against the fraction of the batch that is corrected", report_plots.fractions(series)))
    if kind in ("tpu step", "tpu head"):
        chip = rows[0]["chip"]
        points = {
            label(row) or row["program"]: (row["product_flops"] / row["bytes"], row["product_flops"] / row["seconds"])
            for row in rows
            if row["bytes"]
        }
        picture = report_plots.roofline(points, chip["flops_per_second"], chip["bytes_per_second"])
        found.append((f"Roofline of a {chip['name']} core: estimated seconds, counted operations and bytes", picture))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, float) and value >= 1e9:
        return f"{value / 1e9:,.4g} G"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
