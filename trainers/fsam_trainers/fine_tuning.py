"""What models learn of another text and forget of their own: short AdamW runs from their weights, at several rates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fsam_core import backends
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.data import load
from fsam_trainers.files import disk_errors
from fsam_trainers.loop import train
from fsam_trainers.pretrained import Pretrained, reading_of
from fsam_trainers.processes import Stopped


def fine_tuned(
    base: Pretrained,
    spec: str,
    rates: list[float],
    out: Path,
    console: Console,
    *,
    framework: str,
    steps: int,
    batch: int,
    tokenizer: Path | None = None,
) -> dict[str, float]:
    """Train from `base` on the text `spec` at each rate; folder of the run -> its rate.

    A run that is in its folder under `out` already is resumed, or taken as it is.

    Raises:
        UserError: as `loop.train`.
        Stopped: when a signal has stopped a run; the next call resumes it.
    """
    model = dataclasses.replace(base.config, dropout=0.0)
    reading = reading_of([base], spec)
    corpus = load(
        spec,
        vocab_size=model.vocab_size,
        seq_len=model.seq_len,
        tokenizer=base.tokenizer_for(spec, tokenizer, reading.get("text_column")),
        **reading,
    )
    found = {}
    for rate in rates:
        settings = Settings(
            framework,  # type: ignore[arg-type]  # checked by Settings
            "adamw",
            model,
            steps,
            batch,
            learning_rate=rate,
            warmup=steps // 10,
            init_from=base.source,
            soft_cap=base.soft_cap,
        )
        folder = out / f"rate-{rate:g}"
        console.say(f"fine-tuning {base.source} at {rate:g}")
        figures = train(settings, corpus, folder, Intervals(probe_steps=0), console)
        if figures["status"] == "stopped":
            raise Stopped(figures["signal"])
        found[str(folder)] = rate
    return found


def write_plot(path: Path, rows: list[dict[str, Any]], learned: str) -> None:
    """Forgetting against learning: for each model and text a line with a point for each rate.

    Args:
        rows: of `evaluation.evaluate` with "base" and "rate"; those of unchanged weights are drawn.
        learned: the text that was fine-tuned on.

    Raises:
        UserError: when matplotlib is not installed, or the disk refuses.
    """
    backends.require("matplotlib.figure")
    import matplotlib.figure

    drawn = [row for row in rows if row["rate"] is not None and row["weights"] == "as trained"]
    gains = {(row["base"], row["rate"]): -row["difference"] for row in drawn if row["data"] == learned}
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in drawn:
        if row["data"] != learned:
            point = (gains[row["base"], row["rate"]], row["difference"])
            lines.setdefault((row["base"], row["data"]), []).append(point)
    figure = matplotlib.figure.Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for (base, data), points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=f"{base}, {data}")
    axes.set_xlabel(f"loss lost on {learned}: learning")
    axes.set_ylabel("loss added elsewhere: forgetting")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
