"""A row of the logit cotangent whose target is almost certain: p_y − 1 keeps its digits in every backend."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from operations import BACKENDS, Problem, back, rounded, to, zbar

from fsam_kernels import spec


def confident(miss: float) -> Problem:
    """Rows whose target has p_y = 1 − miss, with the target's logit at 0, 20 and −20."""
    gap = np.log(miss / (1 - miss) / 7)
    w = np.full((8, 2), gap)
    w[3, 0], w[:, 1] = 0.0, 1.0
    h = np.array([[1.0, 0.0], [1.0, 20.0], [1.0, -20.0]])
    h, w = rounded("float32", h, w)
    return Problem(h, w, np.full(3, 3), np.ones(3), (h, w))


def target_error(got: np.ndarray, p: Problem) -> float:
    """Worst relative error of the target column; the oracle's is minus the sum of the others, which do not cancel."""
    others = np.delete(spec.linear_cross_entropy(p.h, p.w, p.y, p.weights)[2], 3, axis=1).sum(axis=1)
    return float(np.max(np.abs(got[:, 3] / -others - 1)))


@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_row_keeps_its_digits(backend, miss):
    p = confident(miss)
    # Logits of 20 are themselves rounded to 2^-20, so 1 − p_y is known to 1e-5 and no better.
    assert target_error(zbar(backend, p), p) < 1e-5


def test_softmax_minus_one_loses_the_digits_of_a_confident_row():
    p = confident(1e-6)
    got = jax.nn.softmax(to("xla", p.h, "float32") @ to("xla", p.w, "float32").T) - np.eye(8, dtype=np.float32)[p.y]
    assert target_error(back(got) * p.weights[:, None], p) > 1e-3


def test_the_oracle_keeps_the_digits_of_a_confident_row():
    p = confident(1e-9)
    assert target_error(spec.linear_cross_entropy(p.h, p.w, p.y, p.weights)[2], p) < 1e-5
