"""Small finished runs and models for the tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from small_runs import arguments, fsam

from fsam_trainers import pretrained
from fsam_trainers.export import export
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import nested
from fsam_trainers.models.layout import ModelConfig, initial

FRAMEWORKS = ("jax", "torch")


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory) -> dict[str, Path]:
    """A run of AdamW in each framework, on the same text, from other weights."""
    found = {}
    for seed, framework in enumerate(FRAMEWORKS):
        found[framework] = tmp_path_factory.mktemp("runs") / framework
        more = ("--framework", framework, "--method", "adamw", "--steps", 6, "--seed", seed)
        assert fsam(*arguments(text, found[framework], *more)) == 0
    return found


def random_model(**changes) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Sizes and weights of which none is 0 or 1."""
    config = ModelConfig(**{"layers": 2, "width": 12, "heads": 3, "seq_len": 9, "vocab_size": 31, **changes})
    draw = np.random.default_rng(0)
    noise = lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32)
    return config, {name: noise(value) for name, value in initial(config, 0).items()}


def saved(out: Path, *, soft_cap: float = 0.0, tokenizer: Path | None = None, **changes) -> Path:
    """`random_model` as a folder of safetensors."""
    config, weights = random_model(**changes)
    export(pretrained.Pretrained("", "", config, lambda: weights, "", tokenizer, soft_cap=soft_cap), "safetensors", out)
    return out


def logits(framework: str, config: ModelConfig, weights: dict[str, np.ndarray], tokens_BxL: np.ndarray) -> np.ndarray:
    """[B, L, V] of the decoder that is trained."""
    if framework == "jax":
        params = nested(weights)
        h_NxD, w_VxD = jax.jit(flax_decoder.Decoder(config).apply)({"params": params}, tokens_BxL)
        return np.asarray(h_NxD @ w_VxD.T).reshape(*tokens_BxL.shape, -1)
    model = torch_decoder.Decoder(config, weights=weights).eval()
    with torch.no_grad():
        h_NxD, w_VxD = model(torch.from_numpy(tokens_BxL))
        return (h_NxD @ w_VxD.T).numpy().reshape(*tokens_BxL.shape, -1)
