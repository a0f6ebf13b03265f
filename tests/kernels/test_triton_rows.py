"""The Triton stages between the matrix products, run by Triton's interpreter, against the float64 oracle.

`tests/conftest.py` sets TRITON_INTERPRET before Triton is imported. The interpreter takes milliseconds for a program,
so tiles are made small: every case has several tiles of columns and several programs of rows, with ragged tails. It
cuts bfloat16 off where the compilers round (their `cvt.rn`), which stays within the errors allowed here.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import DTYPES, assert_as_good, back, to

from fsam_kernels import spec
from fsam_kernels.options import CROSS_ENTROPY, Loss

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

from fsam_kernels.triton import softmax_stats as stages

# Rows beyond C, which nobody reads, come out of the interpreter as anything.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

C, V, BLOCK, ROWS = 6, 37, 16, 4
ALONE = {"smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss": 1e-2}, "soft-cap": {"soft_cap": 5.0}}
LOSSES = {
    " ".join(names) or "plain": Loss(**{k: v for name in names for k, v in ALONE[name].items()})
    for n in range(4)
    for names in itertools.combinations(ALONE, n)
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(stages, "BLOCK", BLOCK)
    monkeypatch.setattr(stages, "rows_of_combine", lambda T: ROWS)


class Result(NamedTuple):
    """What the stages give, or should give: the cotangent P, and P behind the soft-cap's derivative."""

    loss_C: np.ndarray
    lse_C: np.ndarray
    p_CxV: np.ndarray
    through_CxV: np.ndarray


def logits(dtype: str, scale: float = 1.0, c: int = C, v: int = V, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(u, labels) as `dtype` holds them; row 1 is ignored."""
    random = np.random.default_rng(seed)
    u = torch.from_numpy(random.normal(size=(c, v)) * scale).clamp(-6e4, 6e4).to(getattr(torch, dtype))
    y = random.integers(0, v, c)
    y[1:2] = -1
    return back(u), y


def padded(u: np.ndarray, dtype: str) -> torch.Tensor:
    """As the chunk loop makes it: rows padded to 16 elements, with NaN there that nothing may let through."""
    x = to("torch", u, dtype)
    whole = stages.empty_chunk(*x.shape, x)
    whole._base.fill_(torch.nan)
    return whole.copy_(x)


def run(u: np.ndarray, y: np.ndarray, dtype: str = "float32", loss: Loss = CROSS_ENTROPY, in_place=False) -> Result:
    u_CxV, y_C = padded(u, dtype), torch.from_numpy(y)
    rows, state = stages.statistics(u_CxV, y_C, loss)
    assert all(x.dtype == torch.float32 and x.shape == y_C.shape for x in rows)
    p_CxV = state if in_place else stages.empty_chunk(*u.shape, u_CxV)
    stages.cotangent(state, rows, y_C, loss, p_CxV)
    through = p_CxV.clone()
    if loss.soft_cap is not None:
        stages.through_cap_(through, to("torch", u, dtype), loss.soft_cap)
    return Result(*(back(x) for x in (rows.loss_C, rows.lse_C, p_CxV, through)))


def oracle(u: np.ndarray, y: np.ndarray, loss: Loss = CROSS_ENTROPY) -> Result:
    eye = np.eye(u.shape[1])
    each, lse, p = spec.linear_cross_entropy(u, eye, y, loss=loss)
    return Result(each, lse, p, spec.logit_vjp(p, u, eye, soft_cap=loss.soft_cap)[0])


def plain(u: np.ndarray, y: np.ndarray, dtype: str, loss: Loss) -> Result:
    """The same in PyTorch's own operations, in `dtype`."""
    u_CxV, y_C = to("torch", u, dtype).requires_grad_(), torch.from_numpy(y)
    z_CxV = u_CxV if loss.soft_cap is None else loss.soft_cap * torch.tanh(u_CxV / loss.soft_cap)
    logp_CxV, lse_C, s = z_CxV.log_softmax(1), z_CxV.logsumexp(1), loss.label_smoothing
    each_C = -(1 - s) * logp_CxV.gather(1, y_C.clamp_min(0)[:, None])[:, 0]
    if s:
        each_C = each_C - s * logp_CxV.mean(1)
    if loss.z_loss:
        each_C = each_C + loss.z_loss * lse_C**2
    each_C = torch.where(y_C >= 0, each_C, 0)
    p_CxV, through_CxV = torch.autograd.grad(each_C.sum(), (z_CxV, u_CxV))
    return Result(*(back(x.detach()) for x in (each_C, lse_C, p_CxV, through_CxV)))


def assert_matches(got: Result, u: np.ndarray, y: np.ndarray, dtype: str, loss: Loss) -> None:
    for x, p, o in zip(got, plain(u, y, dtype, loss), oracle(u, y, loss), strict=True):
        assert_as_good(x, p, o, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_error_is_within_that_of_plain_code_by_option(name):
    u, y = logits("float32", 3)
    assert_matches(run(u, y, "float32", LOSSES[name]), u, y, "float32", LOSSES[name])


@pytest.mark.parametrize(("name", "scale"), [("plain", 1), ("plain", 1000), ("smoothing z-loss soft-cap", 30)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_that_of_plain_code_by_dtype_and_scale(name, dtype, scale):
    u, y = logits(dtype, scale)
    assert_matches(run(u, y, dtype, LOSSES[name]), u, y, dtype, LOSSES[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_the_same_as_out_of_place(dtype):
    u, y = logits(dtype, 3)
    loss = LOSSES["smoothing z-loss"]
    assert all(np.array_equal(a, b) for a, b in zip(run(u, y, dtype, loss), run(u, y, dtype, loss, True), strict=True))


def test_float32_logits_may_have_their_cotangent_in_bfloat16():
    u, y = logits("float32", 3)
    u_CxV, y_C = padded(u, "float32"), torch.from_numpy(y)
    out_CxV = torch.empty(C, V, dtype=torch.bfloat16)
    stages.cotangent(u_CxV, stages.statistics(u_CxV, y_C, CROSS_ENTROPY)[0], y_C, CROSS_ENTROPY, out_CxV)
    assert np.abs(back(out_CxV) - oracle(u, y).p_CxV).max() <= 2**-8


@pytest.mark.parametrize("stride", ["tight", "unaligned", "column slice"])
def test_any_row_stride_gives_the_same(stride):
    u, y = logits("float32", 3)
    width, start = {"tight": (V, 0), "unaligned": (V + 2, 0), "column slice": (2 * V, V)}[stride]
    whole = torch.full((C, width), 7.0)
    u_CxV, y_C = whole[:, start : start + V], torch.from_numpy(y)
    u_CxV.copy_(torch.from_numpy(u))
    rows, state = stages.statistics(u_CxV, y_C, CROSS_ENTROPY)
    stages.cotangent(state, rows, y_C, CROSS_ENTROPY, u_CxV)
    want = run(u, y)
    assert np.array_equal(back(rows.loss_C), want.loss_C)
    assert np.array_equal(back(u_CxV), want.p_CxV)
    u_CxV.fill_(7.0)
    assert (whole == 7.0).all()


def confident(miss: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose target, in the last, ragged tile, has p_y = 1 − miss at logits 0, 20 and −20."""
    u = np.full((3, V), np.log(miss / (1 - miss) / (V - 1)))
    u[:, V - 2] = 0.0
    return back(torch.from_numpy(u + np.array([[0.0], [20.0], [-20.0]])).float()), np.full(3, V - 2)


@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9, 1e-20])
def test_confident_row_keeps_its_digits(miss):
    u, y = confident(miss)
    got, want = run(u, y), oracle(u, y)
    target = -np.delete(want.p_CxV, V - 2, axis=1).sum(axis=1)
    # Logits of 20 are themselves rounded to 2^-20, and so is their difference.
    np.testing.assert_allclose(got.p_CxV[:, V - 2], target, rtol=1e-5)
    np.testing.assert_allclose(got.loss_C, -np.log1p(target), rtol=1e-5)


def test_softmax_minus_one_loses_the_digits_of_a_confident_row():
    u, y = confident(1e-9)
    p = torch.softmax(torch.from_numpy(u).float(), 1)[:, V - 2] - 1
    assert np.abs(back(p) / oracle(u, y).p_CxV[:, V - 2] - 1).max() > 0.1


@pytest.mark.parametrize("name", ["plain", "smoothing z-loss soft-cap"])
def test_all_rows_ignored_is_zero_and_keeps_the_true_lse(name):
    u, y = logits("float32", 3)
    got = run(u, np.full_like(y, -100), loss=LOSSES[name])
    assert not got.loss_C.any()
    assert not got.p_CxV.any()
    np.testing.assert_allclose(got.lse_C, oracle(u, y, LOSSES[name]).lse_C, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, -100, -(2**32), -(2**63)])
def test_any_negative_label_makes_its_row_ignored(label):
    u, y = logits("float32", 3)
    got, want = run(u, np.where(y == -1, label, y)), run(u, y)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("c", "v"), [(1, V), (C, 1), (1, 1), (C, BLOCK), (C, 2 * BLOCK), (17, BLOCK + 1)])
def test_one_row_one_column_and_whole_tiles(c, v):
    u, y = logits("float32", 3, c, v)
    loss = LOSSES["smoothing z-loss"]
    for x, o in zip(run(u, y, loss=loss), oracle(u, y, loss), strict=True):
        np.testing.assert_allclose(x, o, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_that_a_product_may_read_is_zero(dtype):
    """As PyTorch's bfloat16 product does on a CPU with AMX; deterministic mode fills what is uninitialised with NaN."""
    like = torch.empty(0, dtype=getattr(torch, dtype))
    torch.use_deterministic_algorithms(True)
    try:
        chunk = stages.empty_chunk(C, V, like)
    finally:
        torch.use_deterministic_algorithms(False)
    assert chunk.isnan().all()
    assert chunk.shape == (C, V)
    assert (chunk.as_strided((C, chunk.stride(0) - V), chunk.stride(), V) == 0).all()


def test_no_rows_at_all():
    u, y = np.zeros((0, V)), np.zeros(0, dtype=np.int64)
    assert run(u, y, loss=LOSSES["soft-cap"]).p_CxV.shape == (0, V)


@pytest.mark.parametrize("label", [V, V + 2, 10**6, 2**40])
def test_label_outside_the_vocabulary_is_nan_in_its_row(label):
    u, y = logits("float32")
    y[4] = label
    got = run(u, y)
    others = np.delete(np.arange(C), 4)
    assert np.isnan(got.loss_C[4])
    assert np.isnan(got.p_CxV[4]).all()
    want = oracle(u[others], y[others])
    np.testing.assert_allclose(got.loss_C[others], want.loss_C, rtol=1e-5)
    np.testing.assert_allclose(got.p_CxV[others], want.p_CxV, rtol=1e-5, atol=1e-7)


def test_a_tile_of_minus_infinity_counts_for_nothing():
    u, y = logits("float32")
    y = np.minimum(y, BLOCK - 1)
    u[:, BLOCK : 2 * BLOCK] = -1e30  # what the oracle can compute with
    want = oracle(u, y)
    got = run(np.where(u == -1e30, -np.inf, u), y)
    np.testing.assert_allclose(got.loss_C, want.loss_C, rtol=1e-5)
    np.testing.assert_allclose(got.p_CxV, want.p_CxV, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_rows_of_the_cotangent_sum_to_zero(scale):
    got = run(*logits("float32", scale)).p_CxV
    assert np.abs(got).sum() > 0
    assert (np.abs(got.sum(axis=1)) <= V * 2**-24 * np.abs(got).max(axis=1)).all()


def test_target_left_in_the_sum_is_noticed():
    """The negative control: the target column of plain softmax, which is off by one, fails the comparison."""
    u, y = logits("float32")
    y = np.maximum(y, 0)
    got = run(u, y)
    got.p_CxV[np.arange(C), y] += 1
    with pytest.raises(AssertionError, match="error"):
        assert_matches(got, u, y, "float32", CROSS_ENTROPY)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap_derivative_keeps_its_digits(soft_cap):
    x = np.array([[0.0, 1e-6, -0.3, 0.6, -2.0, 5.0, 9.0, -12.0, 30.0]]) * soft_cap
    u = to("torch", x, "float32")
    p = torch.ones_like(u)
    stages.through_cap_(p, u, soft_cap)
    np.testing.assert_allclose(back(p), 1 / np.cosh(back(u) / soft_cap) ** 2, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_another_dtype_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"float32, bfloat16 and float16, got {dtype}"):
        stages.statistics(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, dtype=torch.int64), CROSS_ENTROPY)


def test_columns_that_are_not_contiguous_are_refused():
    with pytest.raises(ValueError, match="columns must be contiguous"):
        stages.statistics(torch.zeros(3, 2).T, torch.zeros(2, dtype=torch.int64), CROSS_ENTROPY)


@settings(max_examples=10, deadline=None)
@given(c=st.integers(1, 5), v=st.integers(1, 40), name=st.sampled_from(list(LOSSES)), data=st.data())
def test_any_shape_any_labels_any_options(c, v, name, data):
    y = np.array(data.draw(st.lists(st.integers(-2, v - 1), min_size=c, max_size=c)))
    u = logits("float32", 5, c, v, seed=c + 10 * v)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BLOCK", BLOCK)
        patch.setattr(stages, "rows_of_combine", lambda T: ROWS)
        got = run(u, y, "float32", LOSSES[name])
    for x, o in zip(got, oracle(u, y, LOSSES[name]), strict=True):
        assert np.linalg.norm(x - o) <= 1e-5 * np.linalg.norm(o) + 1e-6
