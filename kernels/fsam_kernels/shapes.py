"""The shapes of real models' heads and weights, for tests, benchmarks and `fsam profile`."""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """Tokens per device and step, features, vocabulary."""

    N: int
    D: int
    V: int


# The presets of the trainers at 8192 tokens a device, and two published heads with larger vocabularies.
HEADS: dict[str, Head] = {
    "tiny": Head(2048, 128, 4096),
    "2m": Head(8192, 168, 32768),
    "24m": Head(8192, 576, 32768),
    "43m": Head(8192, 768, 32768),
    "118m": Head(8192, 1280, 32768),
    "1208m": Head(8192, 2048, 32768),
    "reference": Head(8192, 1024, 32768),  # the shape of the figures in docs/head.md
    "gpt2": Head(8192, 768, 50257),  # a vocabulary no tile divides
    "llama3-8b": Head(8192, 4096, 128256),
}


def decoder(layers: int, D: int, V: int = 32768, positions: int = 512) -> list[tuple[int, ...]]:
    """Shapes of the weights of a decoder without biases, head and embedding tied, as the trainers make it."""
    block: list[tuple[int, ...]] = [(D,), (D, 3 * D), (D, D), (D,), (D, 4 * D), (4 * D, D)]
    return [(V, D), (positions, D), *(layers * block), (D,)]


def _gpt2(layers: int = 12, D: int = 768, V: int = 50257, positions: int = 1024) -> list[tuple[int, ...]]:
    """With biases: 148 tensors."""
    affine: list[tuple[int, ...]] = [(D,), (D,)]
    layer: list[tuple[int, ...]] = [
        *affine, (D, 3 * D), (3 * D,), (D, D), (D,), *affine, (D, 4 * D), (4 * D,), (4 * D, D), (D,)
    ]  # fmt: skip
    return [(V, D), (positions, D), *(layers * layer), *affine]


# Weights of whole models, for the operations in parameter space.
WEIGHTS: dict[str, list[tuple[int, ...]]] = {
    "24m": decoder(6, 576),
    "118m": decoder(6, 1280),
    "1208m": decoder(24, 2048),
    "gpt2": _gpt2(),
}
