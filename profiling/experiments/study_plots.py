"""The pictures of the study."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from fsam_trainers.plots import LINES, MARKS, legend_below, new_figure

if TYPE_CHECKING:
    from study_report import TableRow

SERIES = {
    "to_adamw": "to AdamW",
    "to_decay": "on decay, to that alone",
    "equal_time": "equal time, to AdamW",
    "rounded": "of weights rounded to 4 bits, to AdamW",
}


def losses(title: str, rows: list[TableRow]) -> Any:
    """Each row's paired differences with their intervals; hollow where one seed has none."""
    rows = [row for row in rows if any(getattr(row, name) for name in SERIES)]
    figure, axes = new_figure(0.3 * len(rows) + 2)
    shown = [name for name in SERIES if any(getattr(row, name) for row in rows)]
    for i, name in enumerate(shown):
        points = [(y, found) for y, row in enumerate(rows) if (found := getattr(row, name)) is not None]
        ys, halves = [y + 0.22 * i for y, _ in points], [x.half if x.seeds > 1 else 0 for _, x in points]
        style = {"color": LINES[i], "marker": MARKS[i], "markersize": 4, "linestyle": "none"}
        axes.errorbar([x.mean for _, x in points], ys, xerr=halves, label=SERIES[name], elinewidth=1.5, **style)
        single = [(x.mean, y) for y, (_, x) in zip(ys, points, strict=True) if x.seeds < 2]
        axes.plot([x for x, _ in single], [y for _, y in single], markerfacecolor="white", zorder=3, **style)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(textwrap.fill(title, 42), fontsize=10)
    axes.set_xlabel("difference of the validation loss at the end\n(hollow: one seed)", fontsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", linewidth=0.3)
    legend_below(figure, axes, columns=1)
    return figure
