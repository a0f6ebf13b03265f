"""The pictures of a profiling report, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.patches
import matplotlib.ticker

from fsam_core.regions import REGIONS
from fsam_profiling.regions import IDLE, OTHER
from fsam_profiling.report_tables import amount
from fsam_profiling.rows import METHOD
from fsam_trainers.plots import LINES, MARKS, as_svg, legend_below, new_figure

# Okabe and Ito's palette, which colour-blind readers can distinguish: forward passes light, backward passes dark.
COLOURS = dict(
    zip(
        (*REGIONS, OTHER, IDLE),
        ("#56B4E9", "#0072B2", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#E4E4E4"),
        strict=True,
    )
)


def regions(names: Sequence[str], parts: Sequence[dict[str, float]], unit: str) -> str:
    """A stacked bar for each name; `parts` are region -> amount in `unit`."""
    figure, axis = new_figure(0.42 * len(names) + 1.5)
    held = [x for x in COLOURS if any(x in part for part in parts)]
    for y, part in enumerate(parts):
        left = 0.0
        for region in held:
            width = part.get(region, 0.0)
            axis.barh(y, width, left=left, color=COLOURS[region], edgecolor="white", linewidth=0.4)
            left += width
        axis.text(left, y, f" {amount(left)}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_xlim(0, 1.12 * max(sum(part.values()) for part in parts))
    bars = [mpl.patches.Patch(color=COLOURS[x], label=x) for x in held]
    figure.legend(handles=bars, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return as_svg(figure)


def ratios(names: Sequence[str], values: Sequence[tuple[float, float, float]]) -> str:
    """A point for each name at its ratio, with its 20th and 80th percentile as a line."""
    figure, axis = new_figure(0.27 * len(names) + 0.9)
    for y, (low, middle, high) in enumerate(values):
        axis.plot([low, high], [y, y], color=LINES[0], linewidth=2, alpha=0.5, solid_capstyle="butt")
        axis.plot(middle, y, "o", color=LINES[0], markersize=5)
    axis.axvline(1, color="#888888", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("step over AdamW's")
    axis.grid(axis="x", alpha=0.25)
    return as_svg(figure)


def fractions(series: dict[str, list[tuple[float, float, float, float]]]) -> str:
    """Ratio to AdamW against the fraction q of the batch that carries the correction.

    Args:
        series: label -> (q, ratio, 20th, 80th percentile) of each point; AdamW itself stands at (0, 1).
    """
    figure, axis = new_figure(3.4)
    for (label, points), colour, mark in zip(series.items(), LINES * 4, MARKS * 4, strict=False):
        whole = sorted([(0.0, 1.0, 1.0, 1.0), *points])
        axis.plot([x[0] for x in whole], [x[1] for x in whole], mark + "-", color=colour, label=label, markersize=4)
        axis.vlines([x[0] for x in whole], [x[2] for x in whole], [x[3] for x in whole], color=colour, alpha=0.4)
    axis.set_xlabel("fraction q of the batch with a correction")
    axis.set_ylabel("step over AdamW's")
    axis.set_xlim(-0.03, 1.03)
    axis.grid(alpha=0.25)
    legend_below(figure, axis)
    return as_svg(figure)


def roofline(points: dict[str, tuple[float, float]], flops_per_second: float, bytes_per_second: float) -> str:
    """Operations a second against operations a byte, both logarithmic, under the roof of bandwidth and peak.

    Args:
        points: label -> (operations a byte, operations a second).
    """
    figure, axis = new_figure(3.6)
    ridge = flops_per_second / bytes_per_second
    reach = [x for x, _ in points.values()]
    low, high = min([ridge, *reach]) / 4, max([ridge, *reach]) * 4
    axis.plot([low, ridge, high], [low * bytes_per_second, flops_per_second, flops_per_second], color="#444444")
    for (label, (x, y)), colour, mark in zip(points.items(), LINES * 9, MARKS * 9, strict=False):
        axis.plot(x, y, mark, color=colour, label=label, markersize=6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(min(y for _, y in points.values()) / 3, 3 * flops_per_second)
    for along in (axis.xaxis, axis.yaxis):
        along.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_xlabel("operations of matrix products a byte moved")
    axis.set_ylabel("operations a second")
    axis.grid(alpha=0.25)
    legend_below(figure, axis)
    return as_svg(figure)


def by_fraction(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float, float]]]:
    """The series of `fractions` from rows of steps that have "method", "options" and "ratio"."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        options = row.get("options")
        if row["method"] != METHOD or options is None or set(options) - {"correction_fraction", "cut"}:
            continue
        where = row.get("framework") or f"{row['chip']['name']} {row['backend']}"
        label = where + (", hidden cut" if options.get("cut") == "hidden" else "")
        middle = row["ratio"]
        spread = (row.get("ratio_p20", middle), row.get("ratio_p80", middle))
        found.setdefault(label, []).append((options.get("correction_fraction", 1.0), middle, *spread))
    return found
