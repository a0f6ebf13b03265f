"""Weights as they are after training: rounded to few bits, or with noise. Every matrix but the positions is changed."""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]


def rounded(weights: Weights, bits: int) -> Weights:
    """Round to nearest, by channel: s · round(w / s) with s = max |w| of the channel / (2^(bits − 1) − 1).

    A channel is an output of a projection (a column) or a token of the embedding or the head (a row).

    Args:
        weights: float32 by flat name.
        bits: at least 2.
    """
    levels = 2 ** (bits - 1) - 1

    def round_one(name: str, w: np.ndarray) -> np.ndarray:
        largest = np.abs(w).max(axis=1 if name in ("embedding", "head") else 0, keepdims=True)
        scale = np.where(largest > 0, largest / levels, 1).astype(np.float32)
        return np.rint(w / scale) * scale

    return {name: round_one(name, w) if _changes(name, w) else w for name, w in weights.items()}


def noisy(weights: Weights, sigma: float, seed: int) -> Weights:
    """w + sigma · rms(w) · n of each matrix w, with n standard normal; the same n for the same shapes and seed."""
    random = np.random.Generator(np.random.Philox(seed))

    def add_noise(w: np.ndarray) -> np.ndarray:
        scale = np.float32(sigma * np.sqrt(np.mean(np.square(w, dtype=np.float64))))
        return w + scale * random.standard_normal(w.shape, np.float32)

    # Sorted: the frameworks' checkpoints name their arrays in different orders.
    return {name: add_noise(w) if _changes(name, w) else w for name, w in sorted(weights.items())}


def _changes(name: str, w: np.ndarray) -> bool:
    return w.ndim > 1 and name != "positions"
