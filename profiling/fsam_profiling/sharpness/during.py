"""The shares of H g during a run: `fsam train --sharpness-every K`."""

from __future__ import annotations

import numpy as np

from fsam_core.curvature import shares
from fsam_profiling.sharpness.subjects import Curvatures, Subject
from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch, named

_last: dict[bytes, Curvatures] = {}  # of the run that measures: its programs are compiled once


def _curvatures(batch: Batch) -> Curvatures:
    key = b"".join(x.tobytes() for x in named(batch).values())
    if key not in _last:
        _last.clear()
        _last[key] = Curvatures(batch, "float32", "exact")
    return _last[key]


def shares_of(settings: Settings, batch: Batch, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Figures for a line of metrics.jsonl, from exact products along the gradient in float32.

    Args:
        batch: of tokens or images, the same at each call of a run.
        weights: by flat name.
    """
    subject = Subject("", None, settings.method, settings.model, settings.soft_cap, settings.framework, weights, None)
    with _curvatures(batch).of(subject) as curvature:
        g_d, n_d = map(curvature.vector, curvature.both(curvature.gradient))
        found = shares(curvature.vector(curvature.gradient), g_d, n_d)
    return {
        "share_logits": found.gauss_newton,
        "share_function": found.functional,
        "share_cross": found.cross,
        "hessian_along_gradient": found.norm,
    }
