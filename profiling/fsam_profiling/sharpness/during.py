"""The shares of H g during a run: `fsam train --sharpness-every K`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fsam_core.curvature import shares
from fsam_profiling.sharpness.subjects import Curvatures, Subject
from fsam_trainers.config import Settings


@lru_cache(maxsize=1)
def _curvatures(tokens: bytes, length: int) -> Curvatures:
    """Of the run that measures: its programs are compiled once."""
    return Curvatures(np.frombuffer(tokens, np.int32).reshape(-1, length), "float32", "exact")


def shares_of(settings: Settings, tokens_BxL1: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Figures for a line of metrics.jsonl, from exact products along the gradient in float32.

    Args:
        tokens_BxL1: a batch, the same at each call of a run.
        weights: by flat name.
    """
    subject = Subject("", None, settings.method, settings.model, settings.soft_cap, settings.framework, weights, None)
    with _curvatures(tokens_BxL1.astype(np.int32).tobytes(), tokens_BxL1.shape[1]).of(subject) as curvature:
        g_d, n_d = map(curvature.vector, curvature.both(curvature.gradient))
        found = shares(curvature.vector(curvature.gradient), g_d, n_d)
    return {
        "share_logits": found.gauss_newton,
        "share_function": found.functional,
        "share_cross": found.cross,
        "hessian_along_gradient": found.norm,
    }
