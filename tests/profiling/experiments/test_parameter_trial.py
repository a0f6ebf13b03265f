"""The Pallas kernels of the parameter operations that were tried: they are right, and gain nothing."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

import parameter_trial
from fsam_kernels import spec, xla
from fsam_kernels.shapes import WEIGHTS


@pytest.mark.compilers
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("model", ["24m", "118m"])
def test_trial_kernels_gain_nothing(model):
    for ours, trial in zip(*[iter(parameter_trial.compare("v5e", WEIGHTS[model]))] * 2, strict=True):
        assert trial["kernels"] > 0
        assert trial["scheduled_cycles"] >= 0.99 * ours["scheduled_cycles"]


@pytest.mark.slow
def test_trial_kernels_match_the_spec(monkeypatch):
    monkeypatch.setattr(parameter_trial, "BLOCK_BYTES", 2**16)
    random = np.random.default_rng(0)
    shapes = [(300, 130), (7,), (1000, 576), (8, 8), (513,)]
    theta, g, m, v = ([random.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(4))
    v = [x * x for x in v]
    sums = parameter_trial.norm(
        *([jnp.asarray(x) for x in xs] for xs in (g, v)), clip=0.5, adam=xla.Adam(0.95, 1e-8, 0.3), interpret=True
    )
    want = spec.preconditioned_norm(g, v, clip=0.5, b2=0.95, eps=1e-8, correction=0.3)
    np.testing.assert_allclose([float(x) for x in sums], want, rtol=1e-5)
    lists = [[jnp.asarray(x) for x in xs] for xs in (theta, g, m, v)]
    new = parameter_trial.adamw(*lists, step=3, lr=0.01, clip=0.5, interpret=True)
    for i, row in enumerate(zip(theta, g, m, v, strict=True)):
        oracle = spec.adamw(*row, step=3, lr=0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4, clip=0.5)
        for x, o in zip(new[:3], oracle, strict=True):
            assert np.abs(x[i] - o).max() <= 40 * 2**-24 * np.abs(o).max()
