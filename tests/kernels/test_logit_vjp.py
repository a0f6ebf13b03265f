"""`logit_vjp` in every backend: heads and dtypes; test_linear_cross_entropy checks its values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from operations import BACKENDS, OPS, back, rounded, to

from fsam_kernels import spec


def setting(backend: str, dtype: str, keep: bool = False):
    """(h, w, the backend's cotangent, the oracle's cotangent)."""
    random = np.random.default_rng(1)
    h, w = rounded(dtype, random.normal(size=(19, 6)), random.normal(size=(23, 6)))
    y, weights = random.integers(-1, 23, 19), np.full(19, 1 / 16)
    tensors = to(backend, h, dtype), to(backend, w, dtype), to(backend, y), to(backend, weights, "float32")
    cotangent = OPS[backend].linear_cross_entropy(*tensors, keep=keep)[2]
    return h, w, cotangent, spec.linear_cross_entropy(h, w, y, weights)[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_linear_in_the_head(backend):
    h, w, cotangent, _ = setting(backend, "float32")
    call = lambda h, w: OPS[backend].logit_vjp(cotangent, to(backend, h, "float32"), to(backend, w, "float32"))
    for once, twice in zip(call(h, w)[:2], call(2 * h, 2 * w)[:2], strict=True):
        assert np.array_equal(2 * back(once), back(twice))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_have_the_dtypes_of_the_head_given(backend, dtypes, keep):
    h, w, cotangent, zbar = setting(backend, "bfloat16", keep)
    got = OPS[backend].logit_vjp(cotangent, to(backend, h, dtypes[0]), to(backend, w, dtypes[1]))
    for x, dtype, o in zip(got[:2], dtypes, spec.logit_vjp(zbar, h, w)[:2], strict=True):
        assert str(x.dtype).removeprefix("torch.") == dtype
        assert np.linalg.norm(back(x) - o) < 2**-7 * np.linalg.norm(o)
    assert got.bbar_V is None


def arrays(cotangent) -> list[np.ndarray]:
    values = [getattr(cotangent, field.name) for field in dataclasses.fields(cotangent) if field.name != "loss"]
    return [back(x) for x in values if hasattr(x, "dtype")]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_unchanged(backend, keep):
    h, w, cotangent, _ = setting(backend, "float32", keep)
    before = arrays(cotangent)
    assert len(before) == (6 if keep else 7)
    OPS[backend].logit_vjp(cotangent, to(backend, h, "float32"), to(backend, w, "float32"))
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(cotangent), strict=True))
