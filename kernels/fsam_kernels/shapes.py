"""The shapes kernels meet in real models: what tests, benchmarks and `fsam profile` compile and count."""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """Tokens a device and step, features, vocabulary."""

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
    "reference": Head(8192, 1024, 32768),  # what the figures in the documents are for
    "gpt2": Head(8192, 768, 50257),  # a vocabulary no tile divides
    "llama3-8b": Head(8192, 4096, 128256),
}
