"""`fsam cost`: the counted cost of methods and savings relative to AdamW, or the savings that fit a budget.

Nothing is trained. `--machine here` measures this machine's rates first, which takes seconds.
"""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from fsam_trainers import cost_table
from fsam_trainers.cli.cost_options import CostOptions, given, settings_of
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.files import writable, write_json
from fsam_trainers.tables import show, show_lines


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    return run(parsed(CostOptions, arguments, "fsam cost"))


def run(options: CostOptions) -> int:
    """Count, print the tables, write the file; 0.

    Raises:
        UserError: naming the option that is wrong.
    """
    if options.json is not None:
        writable("--json", options.json)
    found = figures(options)
    if options.json is not None:
        write_json(options.json, found)
    show(*tables(found, several=options.budget is not None or options.all, devices=options.devices))
    show_lines(*found["notes"])
    return 0


def figures(options: CostOptions) -> dict[str, Any]:
    """`cost_table.figures` of these options."""
    return cost_table.figures(
        settings_of(options),
        options.preset,
        options.machine,
        devices=options.devices,
        every_saving=options.all,
        budget=options.budget,
        spare=options.spare,
        kept={name.removeprefix("correction_") for name in given(options)},
    )


def tables(found: dict[str, Any], *, several: bool, devices: int) -> list[Table]:
    """One table of all rows of `cost_table.figures`; for a single row also its regions and its memory."""
    reduced = devices > 1
    summary = Table(title=found["title"])
    summary.add_column("options" if several else "method")
    headings = ["operations x", "time x", "corrected step x", "memory x", "peak GiB", "loss"]
    for heading in (*headings, *["gradients reduced", "GB"] * reduced):
        summary.add_column(heading, justify="right")
    for row in found["rows"]:
        corrected = row["steps"].get("corrected")
        cells = [row["name"], f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}"]
        cells.append(f"{corrected['time_ratio']:.3f}" if corrected else "")
        peak = f"{row['peak_bytes'] / 2**30:,.2f}{'' if row['fits'] else '*'}"
        cells += [f"{row['peak_ratio']:.2f}", peak, "" if row["study"] is None else f"{row['study']:+.3f}"]
        if reduced:
            cells += [f"{row['collectives']['gradients']:.2f}", f"{row['collectives']['bytes'] / 1e9:,.2f}"]
        summary.add_row(*cells)
    return [summary] if len(found["rows"]) != 1 else [summary, _regions(found["rows"][0]), _memory(found["rows"][0])]


def _regions(row: dict[str, Any]) -> Table:
    """Operations, bytes and time of the average step by region."""
    unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "G")) if row["flops"] / u >= 1 or u == 1e9)
    table = Table(title="the average step by region")
    table.add_column("region")
    flops = [f"{part}, {name}FLOP" for part in ("blocks", "attention", "head")]
    for heading in (*flops, "GB between", "ms", "of the time"):
        table.add_column(heading, justify="right")
    total = row["seconds"]

    def add(region: str, seconds: float, *cells: float) -> None:
        texts = [f"{x:,.2f}" if x else "" for x in cells]
        table.add_row(region, *texts, f"{1000 * seconds:,.2f}", f"{seconds / total:.1%}")

    sums = dict.fromkeys(("trunk", "attention", "head", "kept", "bytes"), 0.0)
    for region, x in row["regions"].items():
        sums = {part: so_far + x[part] for part, so_far in sums.items()}
        add(region, x["seconds"], *_cells(x, unit))
    if row["taken_seconds"] > 1e-3 * total:
        add("touching new memory", row["taken_seconds"], 0, 0, 0, 0)
    table.add_section()
    add("together", total, *_cells(sums, unit))
    return table


def _cells(x: dict[str, float], unit: float) -> tuple[float, ...]:
    return x["trunk"] / unit, x["attention"] / unit, (x["head"] + x["kept"]) / unit, x["bytes"] / 1e9


def _memory(row: dict[str, Any]) -> Table:
    """What each kind of step holds at its peak."""
    table = Table(title="memory at its peak, GiB")
    table.add_column("held")
    names = list(dict.fromkeys(name for one in row["steps"].values() for name in one["memory"]))
    for kind in row["steps"]:
        table.add_column(f"{kind} step", justify="right")
    for name in names:
        values = [one["memory"].get(name, 0.0) for one in row["steps"].values()]
        table.add_row(name, *(f"{x / 2**30:,.3f}" if x else "" for x in values))
    table.add_section()
    table.add_row("together", *(f"{math.fsum(x['memory'].values()) / 2**30:,.3f}" for x in row["steps"].values()))
    return table
