"""One run of the study in a process of its own: reads run.json, trains, writes figures.json when it is done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from fsam_trainers import metrics
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.data import prepare
from fsam_trainers.files import write_json
from fsam_trainers.loop import train
from fsam_trainers.models.layout import ModelConfig


def main(path: Path) -> None:
    """Train what the file says; a stopped run resumes."""
    asked: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    out = Path(asked["out"])
    # Runs that differ in their seed alone share a program.
    jax.config.update("jax_compilation_cache_dir", str(out.parent / "compiled"))
    model = ModelConfig(**asked["settings"].pop("model"))
    settings = Settings(model=model, **asked["settings"])
    corpus = prepare(asked["data"], vocab_size=model.vocab_size, seq_len=model.seq_len, max_tokens=asked["max_tokens"])
    pace = Intervals(
        evaluate_every=max(1, settings.steps // asked["evaluations"]), checkpoint_every=settings.steps, probe_steps=0
    )
    figures = train(settings, corpus, out, pace, Console(quiet=True))
    if figures["status"] != "finished":
        sys.exit(1)
    held_out = [x for x in metrics.read(out / "metrics.jsonl") if x.get("val_loss") is not None]
    best = min(held_out, key=lambda x: x["val_loss"])
    kept = ("val_loss", "train_loss", "steps", "skipped_steps", "data")
    curve = [[x["step"], x["val_loss"]] for x in held_out]
    write_json(
        out / "figures.json",
        {name: figures[name] for name in kept}
        | {"best_val_loss": best["val_loss"], "best_step": best["step"], "curve": curve},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
