"""Differences between runs of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def difference(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(the mean of the paired differences, the half-width of its 95 % t-interval: infinity of a single pair)."""
    found = np.subtract(mine, other)
    if len(found) < 2:
        return float(found.mean()), math.inf
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    return float(found.mean()), float(stats.t.ppf(0.975, len(found) - 1)) * error


def verdict(mean: float, half: float) -> str:
    """Of a difference of losses: "better", "worse", or "no difference" where the interval holds 0 or it rounds to 0."""
    return "no difference" if abs(mean) <= max(half, 5e-4) else "better" if mean < 0 else "worse"
