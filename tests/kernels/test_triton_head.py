"""The head of the `triton` backend as a whole, in its interpreter: chunks, matrix products, pull-backs, autodiff."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import OPS, back, to
from test_cross_entropy import oracle
from test_linear_cross_entropy import OPTIONS, SIXTEEN_ROWS, assert_all_as_good, problem, with_options

import fsam_kernels.triton

# The interpreter computes with NumPy and says so where an infinity is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setitem(OPS, "triton", fsam_kernels.triton)


@pytest.mark.parametrize(("scale", "keep"), [(1, False), (1000, True)], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_error_is_within_that_of_plain_code(dtype, scale, keep):
    assert_all_as_good("triton", dtype, problem(dtype, scale), keep=keep, chunk_bytes=SIXTEEN_ROWS)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_all_options_together(keep):
    p = with_options(tuple(OPTIONS), scale=3)
    assert_all_as_good("triton", "float32", p, keep=keep, chunk_bytes=SIXTEEN_ROWS)


def test_rows_wider_than_a_tile():
    p = problem(n=5, d=4, v=4500, label_smoothing=0.1)
    assert_all_as_good("triton", "float32", p, chunk_bytes=3 * 4 * 4500)


def test_kept_cotangents_are_padded_to_whole_loads():
    p = problem()
    give = lambda x: to("torch", x, "float32")
    args = give(p.h), give(p.w), to("torch", p.y), give(p.weights)
    kept = fsam_kernels.triton.linear_cross_entropy(*args, keep=True)[2].kept_NxV
    assert kept.shape == (37, 53)
    assert kept.stride() == (64, 1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_and_its_gradients(reduction):
    p = problem(scale=2)
    h, w = (to("torch", x, "float32").requires_grad_() for x in (p.h, p.w))
    weights = None if reduction == "none" else to("torch", p.weights, "float32")
    loss = fsam_kernels.triton.cross_entropy(h, w, to("torch", p.y), weights, reduction=reduction)
    expected, grads = oracle(p, reduction)
    np.testing.assert_allclose(back(loss.detach()), expected, rtol=2e-5, atol=1e-6)
    for x, o in zip(torch.autograd.grad(loss.sum(), (h, w)), grads, strict=True):
        np.testing.assert_allclose(back(x), o, rtol=1e-4, atol=2e-6 * np.abs(o).max())
