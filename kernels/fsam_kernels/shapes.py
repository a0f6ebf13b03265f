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
# And those of Vision Transformers, a row an image. 1,000 classes are no multiple of 16, so that loads of rows are
# of single values, in a head that is a thousandth of a step: kernels are not judged by them.
ALL_HEADS: dict[str, Head] = HEADS | {"vit-s16": Head(1024, 384, 1000), "vit-b16": Head(1024, 768, 1000)}


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


def _vit(
    D: int, layers: int = 12, V: int = 1000, values: int = 16 * 16 * 3, positions: int = 196
) -> list[tuple[int, ...]]:
    """The trainers' Vision Transformer of 16 x 16 patches, its head first as the others have their vocabulary."""
    block: list[tuple[int, ...]] = [(D,), (D, 3 * D), (D, D), (D,), (D, 4 * D), (4 * D, D)]
    with_biases = [shape for one in block for shape in ((one, one) if len(one) == 1 else (one, one[1:]))]
    return [(V, D), (V,), (values, D), (D,), (positions, D), *(layers * with_biases), (D,), (D,)]


# Weights of whole models, for the operations in parameter space.
WEIGHTS: dict[str, list[tuple[int, ...]]] = {
    "24m": decoder(6, 576),
    "118m": decoder(6, 1280),
    "1208m": decoder(24, 2048),
    "gpt2": _gpt2(),
    "vit-s16": _vit(384),
    "vit-b16": _vit(768),
}
