"""`preconditioned_norm` in every backend, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import BACKENDS, DTYPES, OPS, adam_of, back, rounded, to

from fsam_kernels import spec

SHAPES = [(7, 5), (13,), (1,), (), (3, 1, 2)]
ADAM = {"b2": 0.95, "eps": 1e-8}


def tensors(dtype: str = "float32", shapes=SHAPES, scale: float = 1e-2):
    """(gradients, second moments) as float64 values that `dtype` and float32 hold exactly."""
    random = np.random.default_rng(0)
    g = [random.normal(size=s) * scale for s in shapes]
    return rounded(dtype, *g), rounded("float32", *(random.uniform(0, 2, s) * scale**2 for s in shapes))


def settings_of(steps: int, current: bool) -> dict:
    used = steps + current
    return {**ADAM, "current": current, "correction": 1 - ADAM["b2"] ** used if used else 1.0}


def measure(backend: str, g, v=None, dtype: str = "float32", clip: float = 1.0, adam: dict | None = None):
    ops = OPS[backend]
    g = [to(backend, x, dtype) for x in g]
    v = None if v is None else [to(backend, x, "float32") for x in v]
    return [float(x) for x in ops.preconditioned_norm(g, v, clip=clip, adam=adam_of(backend, adam, len(g)))]


# A sum of squares of n float32 terms has a relative error of some roundings, not n, because no term cancels.
FEW_ROUNDINGS = 40 * 2**-24


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_direction(backend, dtype, clip):
    g, _ = tensors(dtype)
    got = measure(backend, g, dtype=dtype, clip=clip)
    np.testing.assert_allclose(got, spec.preconditioned_norm(g, None, clip=clip), rtol=FEW_ROUNDINGS)


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("steps", [0, 1, 1000])
@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_direction(backend, current, steps, clip):
    g, v = tensors()
    v = v if steps else [0 * x for x in v]
    adam = settings_of(steps, current)
    got = measure(backend, g, v, clip=clip, adam=adam)
    np.testing.assert_allclose(got, spec.preconditioned_norm(g, v, clip=clip, **adam), rtol=FEW_ROUNDINGS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_gradients_are_preconditioned_in_float32(backend, dtype):
    g, v = tensors(dtype)
    adam = settings_of(5, True)
    np.testing.assert_allclose(
        measure(backend, g, v, dtype, adam=adam), spec.preconditioned_norm(g, v, **adam), rtol=FEW_ROUNDINGS
    )


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradient_has_norm_zero(backend, current):
    g, v = tensors()
    g = [0 * x for x in g]
    assert measure(backend, g) == [0, 0]
    assert measure(backend, g, [0 * x for x in v], adam=settings_of(0, current)) == [0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_half_gradients_do_not_overflow(backend, dtype):
    g = [np.full((4, 4), 2.0**14)]
    np.testing.assert_allclose(measure(backend, g, dtype=dtype), spec.preconditioned_norm(g, None), rtol=FEW_ROUNDINGS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("adam", [None, settings_of(3, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_or_overflows_shows(backend, adam, bad):
    g, v = tensors()
    g[0][2, 2] = bad
    got = measure(backend, g, v if adam else None, adam=adam)
    # 1e30² overflows in the plain norm; preconditioned, it is one element of size 1/sqrt(1 - b2) unless v̂ overflows.
    assert not np.isfinite(got).all() or (adam and bad == 1e30)


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4), clip=st.floats(0.01, 1)
)
def test_any_list_of_shapes(shapes, clip):
    g, v = tensors(shapes=shapes)
    adam = settings_of(2, True)
    got = measure("torch", g, v, clip=clip, adam=adam)
    np.testing.assert_allclose(got, spec.preconditioned_norm(g, v, clip=clip, **adam), rtol=FEW_ROUNDINGS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_are(backend):
    (g, v), ops = tensors(), OPS[backend]
    gs, vs = [to(backend, x, "float32") for x in g], [to(backend, x, "float32") for x in v]
    ops.preconditioned_norm(gs, vs, clip=0.5, adam=adam_of(backend, settings_of(3, True), len(gs)))
    assert all(np.array_equal(a, back(b)) for a, b in zip(g + v, gs + vs, strict=True))
