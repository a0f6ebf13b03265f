"""Settings of one step of a preset and a batch for it, for the commands that time, trace and count steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch
from fsam_trainers.data.images.batches import images
from fsam_trainers.models.vit_layout import ViTConfig
from fsam_trainers.presets import preset

STEPS = 1000  # length of the run that the step belongs to; schedules need it


def step_settings(
    name: str,
    method: str,
    *,
    batch: int | None = None,
    seq_len: int | None = None,
    vocab_size: int | None = None,
    changes: dict[str, Any] | None = None,
    **more: Any,
) -> Settings:
    """Settings of a step of the preset called `name`; `changes` and `more` are other fields of `Settings`.

    Raises:
        UserError: for an unknown preset, and from `Settings`.
    """
    size = preset(name)
    model = size.model(seq_len=seq_len, vocab_size=vocab_size, tied=True, dropout=0.0)
    rates = {"learning_rate": size.learning_rate, "rho": size.rho}
    same: dict[str, Any] = {"framework": "jax", "steps": STEPS, **rates, **(changes or {}), **more}
    return Settings(method=method, model=model, batch=size.batch if batch is None else batch, **same)


def random_tokens(chosen: Settings) -> np.ndarray:
    """tokens_BxL1 int32, deterministic."""
    size = (chosen.batch, chosen.model.seq_len + 1)
    return np.random.default_rng(0).integers(0, chosen.model.vocab_size, size, dtype=np.int32)


def random_batch(chosen: Settings) -> Batch:
    """Tokens or images, deterministic."""
    c = chosen.model
    if not isinstance(c, ViTConfig):
        return random_tokens(chosen)
    random, B = np.random.default_rng(0), chosen.batch
    pixels = random.integers(0, 256, (B, c.height, c.image_width, c.channels), dtype=np.uint8)
    return images(pixels, random.integers(0, c.classes, (B, 1), dtype=np.int32))
