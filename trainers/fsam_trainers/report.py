"""What a comparison leaves to look at: one PNG and one self-contained HTML page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core import backends
from fsam_trainers.files import disk_errors, write_text
from fsam_trainers.page import Section, render

for _module in ("matplotlib", "jinja2"):
    backends.require(_module)

import matplotlib.figure  # noqa: E402

from fsam_trainers.plots import LINES, as_svg, bare, legend_below, new_figure  # noqa: E402

SMOOTHING = 0.95
Line = dict[str, Any]
Curves = Mapping[str, Sequence[Sequence[Line]]]  # method -> for each seed its metrics
STEPS, SECONDS = "optimizer steps", "seconds: median interleaved step × steps"


def write_plot(path: Path, curves: Curves, step_ms: Mapping[str, float]) -> None:
    """The PNG: loss against steps and, beside it, against time.

    Args:
        step_ms: milliseconds of each method's step. Wall time on a shared machine says less.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label, scale in zip(axes, (STEPS, SECONDS), (dict.fromkeys(curves, 1.0), _seconds(step_ms)), strict=True):
        bare(axis)
        draw_losses(axis, curves, scale)
        axis.set_xlabel(label)
    axes[0].set_ylabel("loss (nats a token)")
    legend_below(figure, axes[0], 3)
    with disk_errors(path):
        figure.savefig(path, dpi=150)


def pictures(curves: Curves, step_ms: Mapping[str, float]) -> list[tuple[str, str]]:
    """(caption, SVG) of the page's pictures."""
    found = []
    seeds = max(len(runs) for runs in curves.values())
    band = f"mean of {seeds} seeds, band: least to largest" if seeds > 1 else "one seed"
    for label, scale in ((SECONDS, _seconds(step_ms)), (STEPS, dict.fromkeys(curves, 1.0))):
        figure, axis = new_figure(3.6)
        draw_losses(axis, curves, scale)
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylabel("loss (nats a token)", fontsize=9)
        legend_below(figure, axis)
        what = "time" if label == SECONDS else "steps"
        found.append((f"Validation loss against {what}; {band}; faint: training loss, smoothed", as_svg(figure)))
    for name, caption in (
        ("grad_norm", "Norm of the gradient that the optimizer receives, before clipping; smoothed"),
        ("correction_ratio", "Correction: ‖ĝ − g‖ / ‖g‖ of the same batch"),
    ):
        drawn = {method: runs for method, runs in curves.items() if any(_having(name, lines) for lines in runs)}
        if drawn:
            figure, axis = new_figure(3.0)
            for method, colour in _colours(curves):
                if method in drawn:
                    steps_T, (mean_T, _, _) = _over_seeds(drawn[method], name, smooth=name == "grad_norm")
                    axis.plot(steps_T, mean_T, color=colour, linewidth=1.2, label=method)
            axis.set_xlabel(STEPS, fontsize=9)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            legend_below(figure, axis)
            found.append((caption, as_svg(figure)))
    return found


def draw_losses(axis: Any, curves: Curves, scale: Mapping[str, float]) -> None:
    """Validation losses as mean and band over the seeds, training losses faint behind them.

    Args:
        scale: method -> the length of a step on the x axis.
    """
    held: list[float] = []
    trained: list[float] = []
    for method, colour in _colours(curves):
        runs = curves[method]
        steps_T, (mean_T, low_T, high_T) = _over_seeds(runs, "val_loss")
        x_T = scale[method] * steps_T
        axis.plot(x_T, mean_T, color=colour, marker="o", markersize=3, linewidth=1.5, label=method)
        if len(runs) > 1:
            axis.fill_between(x_T, low_T, high_T, color=colour, alpha=0.2, linewidth=0)
        held += [*low_T[len(low_T) // 4 :], *high_T[len(high_T) // 4 :]]  # the start is higher, and the same for all
        steps_T, (mean_T, _, _) = _over_seeds(runs, "loss", smooth=True)
        axis.plot(scale[method] * steps_T, mean_T, color=colour, alpha=0.3, linewidth=1)
        trained += mean_T[len(mean_T) // 2 :].tolist()
    axis.grid(alpha=0.25)
    if held:
        low_y, high_y = min(held), max(held)
        span = max(high_y - low_y, 0.02)
        # The held-out curves fill the picture; a training loss far below them must not press them flat.
        floor = max(min([low_y, *trained]), low_y - 0.5 * span)
        axis.set_ylim(floor - 0.05 * span, high_y + 0.05 * span)


def write_report(path: Path, comparison: Line, curves: Curves, texts: Mapping[str, str]) -> None:
    """The table, the pictures and the samples in one HTML file that needs nothing else.

    Args:
        comparison: what `compare.compare` returns.
        texts: what `samples.written` returns.
    """
    rows = comparison["rows"]
    losses = [row["val_loss_mean"] for row in rows]
    changed = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in comparison["changed"].items())
    columns = [i for i in range(len(comparison["columns"])) if any(row["cells"][i] for row in rows)]
    section = Section(
        comparison["title"],
        [comparison["columns"][i] for i in columns],
        [[row["cells"][i] for i in columns] for row in rows],
        comparison["command"],
        facts={
            "options that are not the preset's": changed or "none; comparison.json has all",
            "data": comparison["data"]["description"],
            "data fingerprint": comparison["data"]["fingerprint"],
            "machine": f"{platform.machine()}, Python {platform.python_version()}, " + ", ".join(_versions()),
        },
        pictures=pictures(curves, {row["method"]: row["cost"]["step_ms"] for row in rows}),
        notes=comparison["notes"],
        best=[i for i, loss in enumerate(losses) if loss == min(losses)],
        texts=[(f"{name}:" if name == "prompt" else f"continued, {name}:", text) for name, text in texts.items()],
        commands=comparison["next"],
    )
    write_text(path, render("fsam compare", [section]))


def _seconds(step_ms: Mapping[str, float]) -> dict[str, float]:
    return {method: ms / 1000 for method, ms in step_ms.items()}


def _colours(curves: Curves) -> list[tuple[str, str]]:
    return list(zip(curves, LINES * len(curves), strict=False))


def _having(name: str, lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.get(name) is not None]


def _over_seeds(
    runs: Sequence[Sequence[Line]], name: str, *, smooth: bool = False
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(steps [T], (mean, least, largest [T] over the runs)) at the steps that all runs have."""
    of_runs = []
    for lines in runs:
        held = _having(name, lines)
        values = [line[name] for line in held]
        of_runs.append(dict(zip((line["step"] for line in held), _smoothed(values) if smooth else values, strict=True)))
    steps = sorted(set.intersection(*(set(one) for one in of_runs)))
    values_RxT = np.array([[one[step] for step in steps] for one in of_runs]).reshape(len(of_runs), len(steps))
    return np.array(steps), (values_RxT.mean(0), values_RxT.min(0), values_RxT.max(0))


def _versions() -> list[str]:
    names = ("jax", "torch", "optax", "flax")
    return [f"{name} {version}" for name in names if (version := backends.installed(name))]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in np.asarray(values, dtype=float):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        out.append(float(mean / weight))
    return out
