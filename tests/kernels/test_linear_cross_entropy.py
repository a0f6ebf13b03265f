"""`linear_cross_entropy` and its cotangent in every backend, against the float64 oracle and plain framework code."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import (
    BACKENDS,
    DTYPES,
    OPS,
    TORCH_MODULE,
    assert_as_good,
    back,
    head,
    head_oracle,
    head_plain,
    rounded,
    to,
)

from fsam_kernels import spec
from fsam_kernels.xla.logit_vjp import logit_cotangent

N, D, V = 37, 12, 53


@pytest.fixture(autouse=True)
def _two_chunks_and_a_ragged_tail(monkeypatch):
    monkeypatch.setattr(TORCH_MODULE, "CHUNK_BYTES", 4 * V * 16)
    sizes = [len(range(N)[rows]) for rows in TORCH_MODULE.chunks(torch.zeros(N, D), torch.zeros(V, D))]
    assert sizes == [16, 16, 5]


def problem(dtype: str = "float32", scale: float = 1.0, seed: int = 0, n: int = N, d: int = D, v: int = V):
    """(h, w, labels, weights, moved head), rounded to `dtype`; logits have the standard deviation `scale`."""
    random = np.random.default_rng(seed)
    h, w = random.normal(size=(n, d)) * scale, random.normal(size=(v, d)) / np.sqrt(d)
    y = random.integers(-1, v, n)
    weights = random.uniform(0, 2, n) * (random.random(n) > 0.2) / n
    h, w, h2, w2 = rounded(dtype, h, w, h + 0.1 * random.normal(size=h.shape), w + 0.1 * random.normal(size=w.shape))
    return h, w, y, rounded("float32", weights)[0], (h2, w2)


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_that_of_plain_code(backend, dtype, scale):
    args = problem(dtype, scale)
    got, plain, oracle = head(backend, dtype, *args), head_plain(backend, dtype, *args), head_oracle(*args)
    assert_as_good(got.loss_N, plain.loss_N, oracle.loss_N, dtype)
    assert_as_good(got.lse_N, plain.lse_N, oracle.lse_N, dtype)
    for pair in ("base", "moved"):
        for x, p, o in zip(getattr(got, pair), getattr(plain, pair), getattr(oracle, pair), strict=True):
            assert_as_good(x, p, o, dtype)


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_gradient_formed_in_the_forward_pass_is_as_good(dtype, scale):
    h, w, y, weights, _ = args = problem(dtype, scale)
    tensors = to("torch", h, dtype), to("torch", w, dtype), to("torch", y), to("torch", weights, "float32")
    *_, gradients = OPS["torch"].linear_cross_entropy(*tensors, gradient=True)
    for x, p, o in zip(gradients, head_plain("torch", dtype, *args).base, head_oracle(*args).base, strict=True):
        assert_as_good(back(x), p, o, dtype)


def test_torch_without_gradient_forms_none():
    h, w, y, weights, _ = problem()
    tensors = to("torch", h, "float32"), to("torch", w, "float32"), to("torch", y), to("torch", weights)
    assert OPS["torch"].linear_cross_entropy(*tensors)[3] is None


@pytest.mark.parametrize("chunk_rows", [1, 16, 1000])
def test_torch_chunk_size_does_not_matter(monkeypatch, chunk_rows):
    args = problem()
    whole = head("torch", "float32", *args)
    monkeypatch.setattr(TORCH_MODULE, "CHUNK_BYTES", 4 * V * chunk_rows)
    other = head("torch", "float32", *args)
    np.testing.assert_allclose(other.loss_N, whole.loss_N, rtol=1e-6)
    np.testing.assert_allclose(other.base[1], whole.base[1], rtol=1e-4, atol=1e-6 * np.abs(whole.base[1]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_applying_the_cotangent_twice_gives_twice_the_same(backend):
    got = head(backend, "float32", *problem())
    assert np.array_equal(got.base[0], got.again[0])
    assert np.array_equal(got.base[1], got.again[1])
    assert not np.array_equal(got.base[0], got.moved[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored_is_exactly_zero(backend):
    h, w, y, weights, moved = problem()
    got = head(backend, "float32", h, w, np.full_like(y, -100), weights, moved)
    for x in (got.loss_N, *got.base, *got.moved):
        assert not x.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, D, V), (N, D, 1), (1, 1, 1)])
def test_one_row_or_one_vocabulary_entry(backend, sizes):
    args = problem(n=sizes[0], d=sizes[1], v=sizes[2], seed=3)
    args = (*args[:2], np.maximum(args[2], 0), *args[3:])
    got, plain, oracle = head(backend, "float32", *args), head_plain(backend, "float32", *args), head_oracle(*args)
    for x, p, o in zip(
        (got.loss_N, *got.moved), (plain.loss_N, *plain.moved), (oracle.loss_N, *oracle.moved), strict=True
    ):
        assert_as_good(x, p, o, "float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["negative label", "zero weight"])
def test_an_ignored_row_changes_nothing(backend, ignored):
    h, w, y, weights, (h2, w2) = problem()
    y = np.maximum(y, 0)
    keep = np.arange(N) % 3 != 0
    some_y = np.where(keep | (ignored == "zero weight"), y, -1)
    some_weights = np.where(keep | (ignored == "negative label"), weights, 0)
    got = head(backend, "float32", h, w, some_y, some_weights, (h2, w2))
    short = head(backend, "float32", h[keep], w, y[keep], weights[keep], (h2[keep], w2))
    assert not got.base[0][~keep].any()
    np.testing.assert_allclose(got.base[0][keep], short.base[0], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(got.base[1], short.base[1], rtol=1e-4, atol=1e-6 * np.abs(short.base[1]).max())


def zbar(backend: str, h, w, y, weights) -> np.ndarray:
    """The logit cotangent itself: contracted with an identity, h̄ = z̄ I."""
    tensors = to(backend, h, "float32"), to(backend, w, "float32"), to(backend, y), to(backend, weights, "float32")
    cotangent = OPS[backend].linear_cross_entropy(*tensors)[2]
    eye = to(backend, np.eye(len(w)), "float32")
    return back(OPS[backend].logit_vjp(cotangent, to(backend, np.zeros((len(h), len(w))), "float32"), eye)[0])


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_cotangent_sum_to_zero(backend, scale):
    h, w, y, weights, _ = problem(scale=scale)
    got = zbar(backend, h, w, y, weights)
    assert np.abs(got).sum() > 0
    # The logits are rounded in float32 already, which turns p by |z| roundings.
    roundings = np.abs(h @ w.T).max(axis=1) + V
    assert (np.abs(got.sum(axis=1)) <= 2**-24 * roundings * np.abs(got).max(axis=1)).all()


def confident(miss: float) -> tuple[np.ndarray, ...]:
    """Rows whose target has p_y = 1 − miss, with the target's logit at 0, 20 and −20."""
    gap = np.log(miss / (1 - miss) / 7)
    w = np.full((8, 2), gap)
    w[3, 0], w[:, 1] = 0.0, 1.0
    h = np.array([[1.0, 0.0], [1.0, 20.0], [1.0, -20.0]])
    return (*rounded("float32", h, w), np.full(3, 3), np.ones(3))


def target_error(got: np.ndarray, h, w, y, weights) -> float:
    """Worst relative error of the target column; the oracle's is minus the sum of the others, which do not cancel."""
    others = np.delete(spec.linear_cross_entropy(h, w, y, weights)[2], 3, axis=1).sum(axis=1)
    return float(np.max(np.abs(got[:, 3] / -others - 1)))


@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_row_keeps_the_digits_of_its_target_column(backend, miss):
    args = confident(miss)
    # Logits of 20 are themselves rounded to 2^-20, so 1 − p_y is known to 1e-5 and no better.
    assert target_error(zbar(backend, *args), *args) < 1e-5


def test_softmax_minus_one_loses_the_digits_of_a_confident_row():
    h, w, y, weights = args = confident(1e-6)
    got = jax.nn.softmax(to("xla", h, "float32") @ to("xla", w, "float32").T) - np.eye(8, dtype=np.float32)[y]
    assert target_error(back(got) * weights[:, None], *args) > 1e-3


def test_the_oracle_keeps_the_digits_of_a_confident_row():
    args = confident(1e-9)
    assert target_error(spec.linear_cross_entropy(*args)[2], *args) < 1e-5


def test_xla_loss_of_a_label_outside_the_vocabulary_is_nan():
    h, w, y, weights, moved = problem()
    y[5] = V
    loss = head("xla", "float32", h, w, y, weights, moved).loss_N
    assert np.isnan(loss[5])
    assert np.isfinite(np.delete(loss, 5)).all()


def test_torch_raises_for_a_label_outside_the_vocabulary():
    h, w, y, weights, moved = problem()
    y[5] = V
    with pytest.raises((IndexError, RuntimeError)):
        head("torch", "float32", h, w, y, weights, moved)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_xla_label_dtype_may_be_narrower_than_the_vocabulary(dtype):
    h, w, y, weights, _ = problem(v=300)
    y = np.minimum(np.maximum(y, 0), 255)
    tensors = to("xla", h, "float32"), to("xla", w, "float32"), to("xla", y.astype(dtype)), to("xla", weights)
    got = back(logit_cotangent(OPS["xla"].linear_cross_entropy(*tensors)[2]))
    np.testing.assert_allclose(got, spec.linear_cross_entropy(h, w, y, weights)[2], rtol=1e-4, atol=1e-9)


def check_any(backend: str, n: int, d: int, v: int, y: np.ndarray) -> None:
    h, w, _, weights, moved = problem(n=n, d=d, v=v, seed=n + 10 * d + 100 * v)
    args = h, w, y, weights, moved
    got, plain, oracle = head(backend, "float32", *args), head_plain(backend, "float32", *args), head_oracle(*args)
    for x, p, o in zip(
        (got.loss_N, *got.moved), (plain.loss_N, *plain.moved), (oracle.loss_N, *oracle.moved), strict=True
    ):
        assert_as_good(x, p, o, "float32", k=4)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), v=st.integers(1, 9), rows=st.integers(1, 4), data=st.data())
def test_torch_any_shape_any_labels_any_chunks(n, d, v, rows, data):
    y = np.array(data.draw(st.lists(st.integers(-2, v - 1), min_size=n, max_size=n)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TORCH_MODULE, "CHUNK_BYTES", 4 * v * rows)
        check_any("torch", n, d, v, y)


@settings(max_examples=20, deadline=None)
@given(y=st.lists(st.integers(-2, 4), min_size=6, max_size=6))
def test_xla_any_labels(y):
    check_any("xla", 6, 3, 5, np.array(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_input_is_computed_in_float64(backend):
    args = problem()
    with jax.enable_x64(True):
        tensors = [to(backend, x) for x in args[:4]]
        loss, lse, cotangent, *_ = OPS[backend].linear_cross_entropy(*tensors)
        got = OPS[backend].logit_vjp(cotangent, *(to(backend, x) for x in args[4]))
    oracle = head_oracle(*args)
    for x, o in zip((loss, lse, *got), (oracle.loss_N, oracle.lse_N, *oracle.moved), strict=True):
        np.testing.assert_allclose(back(x), o, rtol=1e-11, atol=1e-14)
