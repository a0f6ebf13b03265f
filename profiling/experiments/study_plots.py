"""The pictures of the study."""

from __future__ import annotations

from typing import Any

import numpy as np

from fsam_core import backends
from fsam_profiling.report_plots import LINES, MARKS
from study import BEST_RIVAL, SAME_TIME

backends.require("matplotlib")

import matplotlib as mpl  # noqa: E402
import matplotlib.figure  # noqa: E402

Figure = mpl.figure.Figure
CURVES = ("AdamW", "AdamW, weight decay", "SAM", "exact", "q = 1/4, ascent full", "q = 1/8, hidden cut")


def losses(found: dict[str, Any]) -> Figure:
    """Every row beside AdamW of the same seed, at equal steps and at equal time; and beside the best rival."""
    regimes = found["regimes"]
    panels: list[tuple[str, list[tuple[str, dict[str, list[float]]]]]] = []
    for name, regime in regimes.items():
        rows = regime["rows"]
        steps = {label: row["to_adamw"]["val_loss"] for label, row in rows.items() if " | " not in label}
        time = _under(rows, SAME_TIME, "to_adamw")
        panels.append((f"{name}: to AdamW", [("equal steps", steps), ("AdamW's time", time)]))
        if stacked := _under(rows, BEST_RIVAL, "to_rival"):
            rival = regime["tuned"]["rival_row"]
            panels.append((f"{name}: on top of {rival}, to that alone", [("equal steps", stacked)]))
    heights = [len({name for _, of in series for name in of} - {"AdamW"}) + 3 for _, series in panels]
    figure = Figure(figsize=(7.5, 0.23 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for axis, (title, series) in zip(axes, panels, strict=True):
        names = [name for name in series[0][1] if name != "AdamW"]
        for i, (label, of) in enumerate(series):
            for name, values in of.items():
                if name in names:
                    y = names.index(name) + 0.22 * i
                    axis.plot([min(values), max(values)], [y, y], color=LINES[i], linewidth=2, alpha=0.45)
                    axis.plot(np.mean(values), y, MARKS[i], color=LINES[i], markersize=5)
            axis.plot([], [], MARKS[i], color=LINES[i], label=label)
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", linewidth=0.3)
        axis.legend(fontsize=8, frameon=False)
    axes[-1].set_xlabel("difference of the validation loss at the end; below 0 is better")
    return figure


def _under(rows: dict[str, Any], suffix: str, difference: str) -> dict[str, list[float]]:
    """The rows of one kind, by the name of their variant."""
    mine = {label.split(" | ")[0]: row for label, row in rows.items() if label.endswith(f" | {suffix}")}
    return {name: row[difference]["val_loss"] for name, row in mine.items()}


def curves(found: dict[str, Any]) -> Figure:
    """Validation loss along the run, mean over the seeds."""
    regimes = found["regimes"]
    figure = Figure(figsize=(7.5, 3.4 * len(regimes)), layout="constrained")
    for axis, (name, regime) in zip(figure.subplots(len(regimes), squeeze=False)[:, 0], regimes.items(), strict=True):
        for i, label in enumerate(x for x in CURVES if x in regime["rows"]):
            row = regime["rows"][label]
            points = [(step, loss) for step, loss in row["curve"] if step > row["steps"] / 5]
            axis.plot(*zip(*points, strict=True), color=LINES[i], marker=MARKS[i], markersize=3, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("validation loss")
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=8, frameon=False)
    return figure


def cosines(found: dict[str, Any]) -> Figure:
    """Cosine with the exact correction, and length beside it, along a run."""
    rows = [row for row in found["cosines"]["rows"] if row["variant"] != "exact"]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    of_cosine, of_length = figure.subplots(2)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["variant"] == name]
        style = {"color": LINES[i % len(LINES)], "marker": MARKS[i // len(LINES)], "markersize": 3}
        for axis, what in ((of_cosine, "cosine"), (of_length, "length")):
            axis.plot([row["step"] for row in mine], [row[what] for row in mine], label=name, **style)
    of_cosine.set_ylabel("cosine with the exact correction")
    of_length.set_ylabel("length, exact = 1")
    of_length.set_yscale("log")
    of_length.set_xlabel("step")
    for axis in (of_cosine, of_length):
        axis.grid(linewidth=0.3)
    figure.legend(
        *of_cosine.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure
