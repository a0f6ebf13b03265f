"""The pictures of a sharpness report, as SVG text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from fsam_trainers.plots import LINES, WIDTH, as_svg, bare, legend_below, new_figure

Row = dict[str, Any]
PARTS = {"gauss_newton": "-", "functional": ":"}


def shares(rows: Sequence[Row]) -> str:
    """The shares of G d and N d against steps, a panel for each direction and a colour for each run.

    Solid lines are the logits' share, dotted ones the function's; marks are filled at radius 0 and open at ρ.
    """
    runs = dict(zip(dict.fromkeys(row["run"] for row in rows), LINES * 9, strict=False))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(WIDTH, 2.4 * len(directions) + 0.8), layout="constrained")
    axes = figure.subplots(len(directions), sharex=True, squeeze=False)[:, 0]
    for axis, direction in zip(axes, directions, strict=True):
        for (run, colour), (part, line), far in itertools.product(runs.items(), PARTS.items(), (False, True)):
            held = [x for x in rows if (x["run"], x["direction"], x["radius"] > 0) == (run, direction, far)]
            axis.plot(
                [x["step"] or 0 for x in held],
                [x[part] for x in held],
                "o" + line,
                color=colour,
                markerfacecolor="white" if far else colour,
                markersize=4,
                linewidth=1,
                label=None if far or part == "functional" else run,
            )
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylabel(f"share along {direction}", fontsize=8)
        axis.grid(alpha=0.25)
        bare(axis)
    axes[-1].set_xlabel("steps")
    legend_below(figure, axes[0])
    return as_svg(figure)


def densities(rows: Sequence[Row]) -> str:
    """The density of eigenvalues, smoothed with a Gaussian of a hundredth of their range, logarithmic."""
    figure, axis = new_figure(3.0)
    for row, colour in zip(rows, LINES * 9, strict=False):
        values, weights = np.array(row["values"]), np.array(row["weights"])
        width = max((values.max() - values.min()) / 100, 1e-12)
        x = np.linspace(values.min() - 3 * width, values.max() + 3 * width, 400)
        bells = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        axis.plot(x, np.maximum(bells @ weights, 1e-9), color=colour, label=f"{row['run']}, {row['matrix']}")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-7)
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("density")
    axis.grid(alpha=0.25)
    legend_below(figure, axis)
    return as_svg(figure)


def lines(rows: Sequence[Row]) -> str:
    """The loss along ± d / ‖d‖."""
    figure, axis = new_figure(3.0)
    for row, colour in zip(rows, LINES * 9, strict=False):
        axis.plot(row["distances"], row["losses"], color=colour, label=f"{row['run']}, {row['direction']}")
    axis.set_xlabel("distance along d")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    legend_below(figure, axis)
    return as_svg(figure)


def plane(row: Row) -> str:
    """Contours of the loss over the plane of the two top eigenvectors of H."""
    figure, axis = new_figure(3.6)
    x, z = row["distances"], np.array(row["losses"])
    contours = axis.contour(x, x, z.T, levels=12, cmap="viridis", linewidths=1)
    axis.clabel(contours, fontsize=6)
    axis.plot(0, 0, "+", color="#000000")
    axis.set_aspect("equal")
    axis.set_xlabel("first eigenvector")
    axis.set_ylabel("second eigenvector")
    return as_svg(figure)
