"""The sizes of a run: of a real GPU, and tiny ones with which the same code runs on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from fsam_kernels.shapes import HEADS, WEIGHTS, Head, decoder
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.presets import PRESETS


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        copy_elements, product_side: of the bandwidth's float32 copy, and of the bfloat16 product.
        vocabularies, rows: of the correctness of the head's kernels.
        huge_logits: rows and columns of more than 2³¹ logits.
        huge_weights: elements of one weight beyond 2³¹.
        heads: of the timings.
        chunk_rows: of the head's timings.
        weights: shapes of a model, for the parameter operations.
        models: for whole steps.
        tokens: of a step.
        repeats: timed calls, of which the median counts.
    """

    device: str
    copy_elements: int
    product_side: int
    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]
    huge_logits: tuple[int, int]
    huge_weights: int
    heads: dict[str, Head]
    chunk_rows: tuple[int, ...]
    weights: list[tuple[int, ...]]
    models: dict[str, ModelConfig]
    tokens: tuple[int, ...]
    repeats: int


def _model(preset: str) -> ModelConfig:
    return PRESETS[preset].model(tied=True, dropout=0.0)


FULL = Sizes(
    device="cuda",
    copy_elements=2**30,
    product_side=8192,
    vocabularies=(4096, 32768, 50257, 128256),
    rows=(1, 17, 2730),
    huge_logits=(17000, 128256),
    huge_weights=2**31 + 5,
    heads={name: HEADS[name] for name in ("24m", "118m", "gpt2", "llama3-8b")},
    chunk_rows=(1024, 2048, 4096, 8192),
    weights=WEIGHTS["118m"],
    models={name: _model(name) for name in ("24m", "118m")},
    tokens=(8192, 16384, 32768),
    repeats=10,
)
SMALL = Sizes(
    device="cpu",
    copy_elements=2**16,
    product_side=64,
    vocabularies=(4096, 4500),
    rows=(1, 3),
    huge_logits=(5, 4500),
    huge_weights=5001,
    heads={"small": Head(16, 8, 4500)},
    chunk_rows=(8, 16),
    weights=decoder(1, 8, V=64, positions=16),
    models={"small": ModelConfig(1, 16, 2, 8, 64)},
    tokens=(64,),
    repeats=1,
)
