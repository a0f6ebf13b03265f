"""`linear_cross_entropy` and its cotangent in every backend, against the float64 oracle and plain framework code."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import (
    BACKENDS,
    DTYPES,
    OPS,
    Problem,
    assert_all_as_good,
    assert_as_good,
    back,
    head,
    head_oracle,
    head_plain,
    rounded,
    to,
    zbar,
)

from fsam_kernels import spec
from fsam_kernels.options import Loss
from fsam_kernels.torch.linear_cross_entropy import chunks as torch_chunks
from fsam_kernels.xla import chunks as xla_chunks

N, D, V = 37, 12, 53
SIXTEEN_ROWS = 16 * V * 8  # float32: 32 rows and a ragged 5 in PyTorch, four chunks of 10 rows, padded, in JAX

OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft-cap": {"soft_cap": 5.0},
    "bias": {"bias": True},
}
PAIRS = [*((name,) for name in OPTIONS), *itertools.combinations(OPTIONS, 2), tuple(OPTIONS)]


def problem(
    dtype: str = "float32",
    scale: float = 1.0,
    seed: int = 0,
    n: int = N,
    d: int = D,
    v: int = V,
    *,
    bias: bool = False,
    **loss: float,
) -> Problem:
    """A head whose arrays are rounded to `dtype`; logits have the standard deviation `scale`."""
    random = np.random.default_rng(seed)
    h, w = random.normal(size=(n, d)) * scale, random.normal(size=(v, d)) / np.sqrt(d)
    y = random.integers(-1, v, n)
    weights = random.uniform(0, 2, n) * (random.random(n) > 0.2) / n
    h, w, h2, w2 = rounded(dtype, h, w, h + 0.1 * random.normal(size=h.shape), w + 0.1 * random.normal(size=w.shape))
    b, b2 = rounded(dtype, random.normal(size=v) * scale, random.normal(size=v) * scale) if bias else (None, None)
    return Problem(h, w, y, rounded("float32", weights)[0], (h2, w2), b, b2, Loss(**loss))


def with_options(names: tuple[str, ...], **more) -> Problem:
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    return problem(**{**options, **more})


def test_chunks_are_several_and_ragged():
    sizes = [len(range(N)[x]) for x in torch_chunks(torch.zeros(N, D), torch.zeros(V, D), Loss(), SIXTEEN_ROWS)]
    assert sizes == [32, 5]
    m = xla_chunks.count(N, V * 8, SIXTEEN_ROWS)
    assert m == 3
    assert xla_chunks.split(jnp.zeros((N, D)), m).shape == (m, 13, D)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (7, 3), (36, 4), (37, 1), (37, 4)])
@pytest.mark.parametrize("strided", [True, False])
def test_xla_join_inverts_split(n, m, strided):
    x = jnp.arange(n * 2.0).reshape(n, 2)
    assert np.array_equal(xla_chunks.join(xla_chunks.split(x, m, strided=strided), n, strided=strided), x)


# Each dtype kept at a large scale, and float32 recomputed at a small one; other combinations are slow.
COMBINATIONS = list(itertools.product(DTYPES, (1, 30, 1000), ("recompute", "keep")))
QUICK = {*((dtype, 1000, "keep") for dtype in DTYPES), ("float32", 1, "recompute")}
SCALES = [pytest.param(*x, marks=[] if x in QUICK else pytest.mark.slow) for x in COMBINATIONS]


@pytest.mark.parametrize(("dtype", "scale", "cotangent"), SCALES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_that_of_plain_code(backend, dtype, scale, cotangent):
    keep = cotangent == "keep"
    assert_all_as_good(backend, dtype, problem(dtype, scale), keep=keep, chunk_bytes=SIXTEEN_ROWS)


# Each option alone, and all together in each dtype; pairs and other combinations are slow.
SOME = [*(("float32", "recompute", (name,)) for name in OPTIONS), ("bfloat16", "keep", tuple(OPTIONS))]
SOME += [("float16", "recompute", tuple(OPTIONS))]
COMBINATIONS = [
    pytest.param(dtype, cotangent, names, marks=[] if (dtype, cotangent, names) in SOME else pytest.mark.slow)
    for dtype in DTYPES
    for cotangent in ("recompute", "keep")
    for names in PAIRS
]


@pytest.mark.parametrize(("dtype", "cotangent", "names"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_alone_and_together(backend, dtype, cotangent, names):
    p = with_options(names, dtype=dtype, scale=3)
    assert_all_as_good(backend, dtype, p, keep=cotangent == "keep", chunk_bytes=SIXTEEN_ROWS)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "soft_cap"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_option_is_noticed(backend, name):
    asked = problem(scale=3, label_smoothing=0.1, z_loss=1e-2, soft_cap=5.0)
    forgot = asked._replace(loss=Loss(**{**vars(asked.loss), name: Loss().__dict__[name]}))
    got, plain, oracle = head(backend, "float32", forgot), head_plain(backend, "float32", asked), head_oracle(asked)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good(got.moved[1], plain.moved[1], oracle.moved[1], "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_cap_derivative_is_that_of_the_moved_head(backend):
    p = problem(scale=3, soft_cap=2.0)
    base = spec.linear_cross_entropy(p.h, p.w, p.y, p.weights, loss=p.loss)[2]
    stale = base * (1 - np.tanh(spec.logits(p.h, p.w) / 2.0) ** 2)
    wrong = spec.logit_vjp(stale, *p.moved)[:2]
    got = head(backend, "float32", p).moved
    assert np.linalg.norm(got[1] - wrong[1]) > 1e-2 * np.linalg.norm(wrong[1])


@pytest.mark.parametrize("bytes_", [1, SIXTEEN_ROWS, 10**9])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_size_does_not_matter(backend, bytes_, keep):
    p = problem(label_smoothing=0.1)
    whole, other = head(backend, "float32", p), head(backend, "float32", p, chunk_bytes=bytes_, keep=keep)
    np.testing.assert_allclose(other.loss_N, whole.loss_N, rtol=1e-6)
    for name in ("base", "moved", "again"):
        for x, y in zip(getattr(other, name), getattr(whole, name), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cotangent_applied_twice_gives_the_same(backend, keep):
    p = problem()
    give = lambda x: to(backend, x, "float32")
    args = give(p.h), give(p.w), to(backend, p.y), give(p.weights)
    cotangent = OPS[backend].linear_cross_entropy(*args, keep=keep)[2]
    first, other, again = (OPS[backend].logit_vjp(cotangent, give(h), give(w)) for h, w in (p[:2], p.moved, p[:2]))
    assert np.array_equal(back(first[0]), back(again[0]))
    assert np.array_equal(back(first[1]), back(again[1]))
    assert not np.array_equal(back(first[0]), back(other[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_none_is_formed(backend):
    p = problem()
    give = lambda x: to(backend, x, "float32")
    assert OPS[backend].linear_cross_entropy(give(p.h), give(p.w), to(backend, p.y), give(p.weights))[3] is None


@pytest.mark.parametrize("names", [("bias",), ("smoothing", "z-loss"), ("soft-cap",)], ids=" ".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored_is_exactly_zero(backend, names):
    p = with_options(names)
    got = head(backend, "float32", p._replace(y=np.full_like(p.y, -100)))
    for x in (got.loss_N, *got.base, *got.moved):
        assert not x.any()


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("torch", (1, D, V)),
        ("torch", (N, D, 1)),
        ("torch", (1, 1, 1)),
        ("xla", (1, 1, 1)),
        pytest.param("xla", (1, D, V), marks=pytest.mark.slow),
        pytest.param("xla", (N, D, 1), marks=pytest.mark.slow),
    ],
)
def test_one_row_or_one_vocabulary_entry(backend, sizes):
    p = problem(n=sizes[0], d=sizes[1], v=sizes[2], seed=3)
    assert_all_as_good(backend, "float32", p._replace(y=np.maximum(p.y, 0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["negative label", "zero weight"])
def test_ignored_row_changes_nothing(backend, ignored):
    p = problem()
    y, keep = np.maximum(p.y, 0), np.arange(N) % 3 != 0
    some_y = np.where(keep | (ignored == "zero weight"), y, -1)
    some_weights = np.where(keep | (ignored == "negative label"), p.weights, 0)
    got = head(backend, "float32", p._replace(y=some_y, weights=some_weights))
    h2, w2 = p.moved
    short = Problem(p.h[keep], p.w, y[keep], p.weights[keep], (h2[keep], w2))
    short = head(backend, "float32", short)
    assert not got.base[0][~keep].any()
    np.testing.assert_allclose(got.base[0][keep], short.base[0], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(got.base[1], short.base[1], rtol=1e-4, atol=1e-6 * np.abs(short.base[1]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_negative_and_tiny(backend):
    p = problem("float16")
    weights = rounded("float32", np.where(np.arange(N) % 2, -1, 1) * p.weights * 1e-6)[0]
    got, oracle = head(backend, "float16", p._replace(weights=weights)), head_oracle(p._replace(weights=weights))
    # In float16 1e-6 / 37 is 0.4 of its smallest number: the weight must not meet the cotangent before the sum.
    wide = OPS[backend].linear_cross_entropy(
        *(to(backend, x, "float16") for x in (p.h, p.w)), to(backend, p.y), to(backend, weights), gradient=True
    )[3]
    scaled = weights * 1e6
    exact = head_oracle(p._replace(weights=scaled)).base[1]
    large = head(backend, "float16", p._replace(weights=rounded("float32", scaled)[0])).base[1]
    assert np.linalg.norm(large - exact) < 2**-8 * np.linalg.norm(exact)
    assert np.linalg.norm(back(wide.wbar_VxD) - oracle.base[1]) <= 2**-25 * np.sqrt(V * D)  # half its smallest number
    assert got.base[1].shape == oracle.base[1].shape


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_cotangent_sum_to_zero(backend, smoothing, scale):
    p = problem(scale=scale, label_smoothing=smoothing)
    got = zbar(backend, p)
    assert np.abs(got).sum() > 0
    # The logits are rounded in float32 already, which turns p by |z| roundings.
    roundings = np.abs(p.h @ p.w.T).max(axis=1) + V
    assert (np.abs(got.sum(axis=1)) <= 2**-24 * roundings * np.abs(got).max(axis=1)).all()


def test_the_oracle_is_the_derivative_of_its_loss():
    p, step = problem(label_smoothing=0.2, z_loss=1e-2, soft_cap=3.0, bias=True), 1e-6
    loss = lambda **x: spec.linear_cross_entropy(**{**args, **x}, loss=p.loss)[0] @ p.weights
    args = {"h_NxD": p.h, "w_VxD": p.w, "labels_N": p.y, "bias_V": p.bias}
    zbar_NxV = spec.linear_cross_entropy(**args, weights_N=p.weights, loss=p.loss)[2]
    got = spec.logit_vjp(zbar_NxV, p.h, p.w, bias_V=p.bias, soft_cap=3.0)
    for name, x, of in zip(("h_NxD", "w_VxD", "bias_V"), (p.h, p.w, p.bias), got, strict=True):
        at = tuple(0 for _ in x.shape)
        moved = [np.array(x), np.array(x)]
        moved[0][at] += step
        moved[1][at] -= step
        slope = (loss(**{name: moved[0]}) - loss(**{name: moved[1]})) / (2 * step)
        assert slope == pytest.approx(of[at], rel=1e-6)


def test_xla_loss_of_a_label_outside_the_vocabulary_is_nan():
    p = problem()
    p.y[5] = V
    loss = head("xla", "float32", p).loss_N
    assert np.isnan(loss[5])
    assert np.isfinite(np.delete(loss, 5)).all()


def test_torch_raises_for_a_label_outside_the_vocabulary():
    p = problem()
    p.y[5] = V
    with pytest.raises((IndexError, RuntimeError)):
        head("torch", "float32", p)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_xla_label_dtype_may_be_narrower_than_the_vocabulary(dtype):
    p = problem(v=300)
    p = p._replace(y=np.minimum(np.maximum(p.y, 0), 255).astype(dtype))
    expected = spec.linear_cross_entropy(p.h, p.w, p.y, p.weights)[2]
    np.testing.assert_allclose(zbar("xla", p), expected, rtol=1e-4, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), v=st.integers(1, 9), rows=st.integers(1, 4), data=st.data())
def test_torch_takes_any_shape_labels_chunks_and_options(n, d, v, rows, data):
    y = np.array(data.draw(st.lists(st.integers(-2, v - 1), min_size=n, max_size=n)))
    loss = {"label_smoothing": data.draw(st.sampled_from([0, 0.3])), "z_loss": data.draw(st.sampled_from([0, 1e-2]))}
    p = problem(n=n, d=d, v=v, seed=n + 10 * d + 100 * v, bias=data.draw(st.booleans()), **loss)
    options = {"chunk_bytes": 4 * v * rows, "keep": data.draw(st.booleans())}
    assert_all_as_good("torch", "float32", p._replace(y=y), k=4, by_terms=True, **options)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(y=st.lists(st.integers(-2, 4), min_size=6, max_size=6), keep=st.booleans())
def test_xla_takes_any_labels(y, keep):
    p = problem(n=6, d=3, v=5, seed=563)
    assert_all_as_good(
        "xla", "float32", p._replace(y=np.array(y)), k=4, by_terms=True, keep=keep, chunk_bytes=8 * 5 * 2
    )


@pytest.mark.parametrize("backend", ["xla", "torch"])
def test_float64_input_is_computed_in_float64(backend):
    p = problem(label_smoothing=0.1, z_loss=1e-3, bias=True)
    with jax.enable_x64(True):
        got, oracle = head(backend, "float64", p, chunk_bytes=SIXTEEN_ROWS), head_oracle(p)
    for x, o in zip((got.loss_N, got.lse_N, *got.moved), (oracle.loss_N, oracle.lse_N, *oracle.moved), strict=True):
        np.testing.assert_allclose(x, o, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_gradients_of_the_weight_are_not_rounded(backend):
    p = problem("bfloat16", bias=True)
    give = lambda x: to(backend, x, "bfloat16")
    args, options = (
        (give(p.h), give(p.w), to(backend, p.y), to(backend, p.weights, "float32")),
        {"bias_V": give(p.bias)},
    )
    *_, z, wide = OPS[backend].linear_cross_entropy(*args, **options, gradient=True, upcast_wbar=True)
    again = OPS[backend].logit_vjp(z, *args[:2], **options, upcast_wbar=True)
    rounded_ = OPS[backend].linear_cross_entropy(*args, **options, gradient=True)[3]
    for x, y in (
        (wide.wbar_VxD, rounded_.wbar_VxD),
        (wide.bbar_V, rounded_.bbar_V),
        (again.wbar_VxD, rounded_.wbar_VxD),
    ):
        assert str(x.dtype).removeprefix("torch.") == "float32"
        assert np.array_equal(rounded("bfloat16", back(x))[0], back(y))
        assert not np.array_equal(back(x), back(y))


@pytest.mark.parametrize("stored", ["VD", "DV"])
def test_torch_gradient_of_a_transposed_weight_has_its_strides(stored):
    p = problem()
    w = to("torch", p.w, "float32")
    w = w if stored == "VD" else w.T.contiguous().T
    given = to("torch", p.h, "float32"), w, to("torch", p.y), to("torch", p.weights, "float32")
    wbar = OPS["torch"].linear_cross_entropy(*given, gradient=True)[3].wbar_VxD
    assert wbar.stride() == w.stride()
    assert_as_good(back(wbar), head_plain("torch", "float32", p).base[1], head_oracle(p).base[1], "float32")


@pytest.mark.parametrize("chunk_bytes", [None, SIXTEEN_ROWS])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_gradient_of_the_weight_adds_onto_what_is_there(dtype, keep, chunk_bytes):
    p = problem(dtype, bias=True)
    give = lambda x: to("torch", x, dtype)
    args = (give(p.h), give(p.w), to("torch", p.y), to("torch", p.weights, "float32"))
    options = {"bias_V": give(p.bias), "chunk_bytes": chunk_bytes}
    there = torch.randn(p.w.shape, generator=torch.Generator().manual_seed(0))
    first, second = there.clone(), there.clone()
    *_, z, got = OPS["torch"].linear_cross_entropy(*args, **options, gradient=True, keep=keep, onto_VxD=first)
    again = OPS["torch"].logit_vjp(z, *args[:2], **options, onto_VxD=second)
    *_, base = OPS["torch"].linear_cross_entropy(*args, **options, gradient=True, keep=keep, upcast_wbar=True)
    moved = OPS["torch"].logit_vjp(z, *args[:2], **options, upcast_wbar=True)
    for gradients, where, alone in ((got, first, base), (again, second, moved)):
        assert gradients.wbar_VxD is where
        np.testing.assert_allclose(where, there + alone.wbar_VxD, rtol=1e-6, atol=1e-6)
        assert torch.equal(gradients.hbar_NxD, alone.hbar_NxD)


def test_torch_onto_of_another_dtype_is_refused():
    p = problem("bfloat16")
    args = [to("torch", x, "bfloat16") for x in (p.h, p.w)] + [to("torch", p.y), to("torch", p.weights, "float32")]
    with pytest.raises(ValueError, match=r"onto_VxD: w̄ is summed in torch\.float32, got a tensor of torch\.bfloat16"):
        OPS["torch"].linear_cross_entropy(*args, gradient=True, onto_VxD=torch.zeros_like(args[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_gradient_of_no_rows_is_zero(dtype):
    given = torch.empty(0, 5, dtype=getattr(torch, dtype)), torch.ones(9, 5, dtype=getattr(torch, dtype))
    *_, got = OPS["torch"].linear_cross_entropy(*given, torch.empty(0, dtype=torch.long), torch.empty(0), gradient=True)
    assert got.wbar_VxD.dtype == given[1].dtype
    assert not got.wbar_VxD.any()
    assert got.hbar_NxD.shape == (0, 5)
