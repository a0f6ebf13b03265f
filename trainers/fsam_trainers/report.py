"""What a comparison leaves to look at: one PNG and one self-contained HTML page."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core import backends
from fsam_trainers.files import disk_errors, write_text
from fsam_trainers.page import Section, png, render

for _module in ("matplotlib", "jinja2"):
    backends.require(_module)

import matplotlib.figure  # noqa: E402

# Okabe and Ito's palette: distinct for colour-blind readers, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SMOOTHING = 0.95


def write_plot(path: Path, curves: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Loss against steps and against time: validation as points joined by lines, training faint behind.

    Args:
        curves: method -> for each seed the run's metrics.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    held, trained = [], []
    for (method, runs), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        for i, lines in enumerate(runs):
            training = [x for x in lines if x.get("loss") is not None]
            held_out = [x for x in lines if x.get("val_loss") is not None]
            smooth = _smoothed([x["loss"] for x in training])
            held += [x["val_loss"] for x in held_out]
            trained += smooth[len(smooth) // 2 :]
            for axis, unit in zip(axes, ("step", "seconds"), strict=True):
                axis.plot([x[unit] for x in training], smooth, color=colour, alpha=0.3, linewidth=1)
                label = method if i == 0 else None
                points, values = [x[unit] for x in held_out], [x["val_loss"] for x in held_out]
                axis.plot(points, values, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=label)
    for axis, label in zip(axes, ("optimizer steps", "seconds in training steps"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if held:
        low, high = min(held), max(held)
        span = max(high - low, 0.02)
        # The held-out curves fill the picture; a training loss far below them must not press them flat.
        floor = max(min([low, *trained]), low - 0.5 * span)
        axes[0].set_ylim(floor - 0.05 * span, high + 0.05 * span)
    axes[0].set_ylabel("loss (nats a token)")
    axes[0].legend(frameon=False, title="validation; faint: training, smoothed", title_fontsize="small")
    with disk_errors(path):
        figure.savefig(path, dpi=150)


def write_report(path: Path, comparison: dict[str, Any], plot: Path) -> None:
    """The table and the plot in one HTML file that needs nothing else.

    Args:
        comparison: what `compare.compare` returns.
    """
    settings = dict(comparison["settings"])
    model = {f"model {name}": value for name, value in settings.pop("model").items()}
    losses = [row["val_loss_mean"] for row in comparison["rows"]]
    description = "Validation and training loss of every method, against optimizer steps and against seconds"
    section = Section(
        comparison["title"],
        comparison["columns"],
        [row["cells"] for row in comparison["rows"]],
        comparison["command"],
        facts=settings
        | model
        | {
            "data": comparison["data"]["description"],
            "data fingerprint": comparison["data"]["fingerprint"],
            "machine": f"{platform.machine()}, Python {platform.python_version()}, " + ", ".join(_versions()),
        },
        pictures=[("Loss against steps and against time", png(plot, description))],
        notes=comparison["notes"],
        best=[i for i, loss in enumerate(losses) if loss == min(losses)],
    )
    write_text(path, render("fsam compare", [section]))


def _versions() -> list[str]:
    found = []
    for name in ("jax", "torch", "optax", "flax"):
        if importlib.util.find_spec(name):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in np.asarray(values, dtype=float):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        out.append(float(mean / weight))
    return out
