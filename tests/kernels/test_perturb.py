"""`perturb` in every backend, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from operations import BACKENDS, DTYPES, OPS, adam_of, back, rounded, to
from test_preconditioned_norm import SHAPES, settings_of, tensors

from fsam_kernels import spec


def weights(dtype: str = "float32"):
    return rounded(dtype, *(np.random.default_rng(7).normal(size=s) for s in SHAPES))


def perturb(
    backend: str, theta, g, v, scale: float, dtype: str = "float32", clip: float = 1.0, adam: dict | None = None
):
    ops = OPS[backend]
    cast = lambda xs, kind: [to(backend, x, kind) for x in xs]
    v = None if v is None else cast(v, "float32")
    scale = to(backend, np.float32(scale))
    return ops.perturb(cast(theta, dtype), cast(g, dtype), v, scale, clip=clip, adam=adam_of(backend, adam, len(g)))


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("adam", [None, settings_of(0, True), settings_of(4, True), settings_of(4, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_are_off_by_roundings(backend, adam, clip):
    theta, (g, v) = weights(), tensors()
    v = v if adam else None
    got = perturb(backend, theta, g, v, 0.5, clip=clip, adam=adam)
    for x, o in zip(got, spec.perturb(theta, g, v, 0.5, clip=clip, **(adam or {})), strict=True):
        np.testing.assert_array_less(np.abs(back(x) - o), 10 * 2**-24 * (np.abs(o) + 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_rounded_once_from_float32(backend, dtype):
    theta, (g, v) = weights(dtype), tensors(dtype)
    adam = settings_of(2, True)
    got = perturb(backend, theta, g, v, 0.1, dtype, adam=adam)
    wide = perturb(backend, theta, g, v, 0.1, adam=adam)
    for x, w, t in zip(got, wide, theta, strict=True):
        assert str(x.dtype).removeprefix("torch.") == dtype
        assert np.array_equal(back(x), rounded(dtype, back(w))[0])
        assert x.shape == t.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_too_small_for_bfloat16_is_lost_in_one_rounding_and_no_other_way(backend):
    theta, g = [np.full((4,), 1.0)], [np.full((4,), 2.0**-7)]
    kept = perturb(backend, theta, g, None, 0.75, "bfloat16")[0]  # 1 + 0.75 ulp rounds up
    lost = perturb(backend, theta, g, None, 0.25, "bfloat16")[0]  # 1 + 0.25 ulp rounds down
    assert (back(kept) == 1 + 2**-7).all()
    assert (back(lost) == 1).all()


@pytest.mark.parametrize("adam", [None, settings_of(0, True), settings_of(0, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_scale_or_zero_gradient_leaves_every_bit(backend, adam):
    theta, (g, v) = weights(), tensors()
    v = [0 * x for x in v] if adam else None
    for gradient, scale in ((g, 0.0), ([0 * x for x in g], 0.5)):
        got = perturb(backend, theta, gradient, v, scale, adam=adam)
        assert all(np.array_equal(back(x), t) for x, t in zip(got, theta, strict=True))


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_current_moment_bounds_a_new_coordinate(backend, current):
    theta, g, v = [np.zeros(3)], [np.array([1.0, 1e-3, 1e3])], [np.zeros(3)]
    d = back(perturb(backend, theta, g, v, 1.0, adam=settings_of(10, current))[0])
    bound = np.sqrt((1 - 0.95**11) / 0.05)
    assert (d <= bound * (1 + 1e-6)).all() == current


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    theta, (g, v) = weights(), tensors()
    g[0][1, 1] = np.nan
    got = back(perturb(backend, theta, g, v, 0.5, adam=settings_of(2, True))[0])
    assert np.isnan(got).sum() == 1
    assert np.isnan(got[1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_are(backend):
    theta, (g, v), ops = weights(), tensors(), OPS[backend]
    lists = [[to(backend, x, "float32") for x in xs] for xs in (theta, g, v)]
    ops.perturb(*lists, to(backend, np.float32(0.5)), clip=0.5, adam=adam_of(backend, settings_of(3, False), len(g)))
    for values, arrays in zip((theta, g, v), lists, strict=True):
        assert all(np.array_equal(a, back(b)) for a, b in zip(values, arrays, strict=True))
