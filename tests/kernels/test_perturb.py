"""`perturb` in every backend, against the float64 oracle."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from operations import BACKENDS, DTYPES, OPS, adam_of, back, rounded, to
from test_preconditioned_norm import MASK, MASKED, SHAPES, settings_of, tensors, tree

import fsam_kernels.torch
import fsam_kernels.xla
from fsam_kernels import spec
from fsam_kernels.torch import perturb as run_torch
from fsam_kernels.torch.rounding import Rounding


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
def test_float32_weights_are_within_roundings(backend, adam, clip):
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
def test_step_too_small_for_bfloat16_is_lost_to_one_rounding(backend):
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
def test_nan_reaches_no_other_weight(backend):
    theta, (g, v) = weights(), tensors()
    g[0][1, 1] = np.nan
    got = back(perturb(backend, theta, g, v, 0.5, adam=settings_of(2, True))[0])
    assert np.isnan(got).sum() == 1
    assert np.isnan(got[1, 1])


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_unchanged(backend, current):
    theta, (g, v), ops = weights(), tensors(), OPS[backend]
    lists = [[to(backend, x, "float32") for x in xs] for xs in (theta, g, v)]
    ops.perturb(*lists, to(backend, np.float32(0.5)), clip=0.5, adam=adam_of(backend, settings_of(3, current), len(g)))
    for values, arrays in zip((theta, g, v), lists, strict=True):
        assert all(np.array_equal(a, back(b)) for a, b in zip(values, arrays, strict=True))


# --- trees, in JAX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("steps", [None, (4, True), (4, False)])
def test_tree_takes_a_scale_for_each_leaf_and_a_mask(steps, dtype):
    theta, (g, v) = weights(), tensors()
    adam = settings_of(*steps) if steps else None
    scales = [0.1, 0.2, 0.3, 0.4, 0.5]
    given = tree(theta)
    got = fsam_kernels.xla.perturb(
        given,
        tree(g),
        tree(v) if adam else None,
        tree(scales),
        clip=0.5,
        adam=adam_of("xla", adam, 5),
        mask=MASK,
        dtype=dtype,
    )
    want = spec.perturb(theta, g, v if adam else None, scales, clip=0.5, mask=MASKED, **(adam or {}))
    for x, o, moves, old in zip(*map(jax.tree.leaves, (got, want, MASK, given)), strict=True):
        assert x.dtype == (dtype or "float32")
        half_unit = 2**-8 if dtype else 10 * 2**-24
        assert (np.abs(back(x) - o) <= half_unit * (np.abs(o) + 1)).all()
        assert moves or dtype or x is old


def test_unperturbed_part_is_computed_once():
    """Two passes of which the first product's weight stays: three products, and four where every weight moves."""
    theta = (jnp.ones((64, 64)), jnp.ones((64, 64)))
    forward = lambda theta, x: jnp.tanh(x @ theta[0]) @ theta[1]

    def both(theta, g, x, mask):
        return forward(theta, x), forward(fsam_kernels.xla.perturb(theta, g, None, 0.1, mask=mask), x)

    products = lambda mask: jax.jit(both, static_argnums=3).lower(theta, theta, theta[0], mask).compile().as_text()
    counts = [len(re.findall(r"= f32\[64,64\]\S* dot\(", products(mask))) for mask in (None, (False, True))]
    assert counts == [4, 3]


def test_the_same_under_jit():
    theta, (g, v) = weights(), tensors()
    adam = adam_of("xla", settings_of(2, True), 5)
    run = lambda *x: fsam_kernels.xla.perturb(*x, adam=adam, mask=MASK)
    given = (tree(theta), tree(g), tree(v), jnp.float32(0.5))
    for x, y in zip(*map(jax.tree.leaves, (run(*given), jax.jit(run)(*given))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2**-22, atol=2**-22)


# --- many tensors, of any kind, in plain PyTorch ----------------------------------------------------------------------

SCALE = torch.tensor(0.1)


def problem(shapes=SHAPES, adam: dict | None = None):
    """(θ, g, v, settings) with settings that are not all the same."""
    make = torch.Generator().manual_seed(0)
    theta, g = ([torch.randn(s, generator=make) * x for s in shapes] for x in (1.0, 1e-2))
    v = [torch.rand(s, generator=make) * 1e-4 for s in shapes]
    return theta, g, v, [fsam_kernels.torch.Adam(**(adam or settings_of(2, i % 2 == 0))) for i in range(len(shapes))]


def want(theta, g, v, adam, scale=0.1, clip: float = 1.0) -> list[np.ndarray]:
    scales = np.broadcast_to(scale, len(theta))
    rows = zip(theta, g, v, adam, scales, strict=True)
    return [spec.perturb([back(t)], [back(x)], [back(m)], s, clip=clip, **a._asdict())[0] for t, x, m, a, s in rows]


def assert_close(got, oracle) -> None:
    for x, o in zip(got, oracle, strict=True):
        assert (np.abs(back(x) - o) <= 10 * 2**-24 * (np.abs(o) + 1)).all()


@pytest.mark.parametrize("shapes", [[(10**6,), (1,), (0,), ()], [(i % 5,) for i in range(3000)], [(2**18 + 1,)]])
def test_tensors_of_all_sizes(shapes):
    theta, g, v, adam = problem(shapes)
    assert_close(run_torch(theta, g, v, SCALE, adam=adam, clip=0.5), want(theta, g, v, adam, clip=0.5))


def test_list_takes_a_scale_for_each_tensor_and_a_mask():
    theta, g, v, adam = problem()
    scale, mask = torch.arange(1.0, 6.0) / 10, [True, False, True, True, False]
    got = run_torch(theta, g, v, scale, adam=adam, mask=mask)
    assert got[1] is theta[1]
    assert_close(got, want(theta, g, v, adam, scale.numpy() * mask))


def test_result_has_the_dtype_of_its_output_tensor():
    theta, g, v, adam = problem()
    out = [torch.full_like(x, 7, dtype=torch.bfloat16) for x in theta]
    mask = [True, True, True, True, False]
    got = run_torch(theta, g, v, SCALE, adam=adam, out=out, mask=mask)
    new = run_torch(theta, g, v, SCALE, adam=adam, dtype=torch.bfloat16, mask=mask)
    wide = run_torch(theta, g, v, SCALE, adam=adam, mask=mask)
    for x, y, z, w in zip(got, out, new, wide, strict=True):
        assert x is y
        assert torch.equal(x, z)
        assert torch.equal(x, w.to(torch.bfloat16))


@pytest.mark.parametrize("clip", [1e-20, 1e-6, 1e-3, 30.0])
@pytest.mark.parametrize("b2", [0.0, 0.5, 0.999])
def test_any_clip_factor_and_moment_decay(clip, b2):
    adam = {"b2": b2, "eps": 1e-8, "correction": 1 - b2**5}
    theta, g, v, adams = problem([(1003,), (7,)], adam)
    g = [x / clip for x in g]
    assert_close(run_torch(theta, g, v, SCALE, adam=adams, clip=clip), want(theta, g, v, adams, clip=clip))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e18])
@pytest.mark.parametrize("current", [True, False])
def test_zero_denormal_and_huge_gradients(value, current):
    shapes, adam = [(100,)], settings_of(3, current)
    theta, _, _, adams = problem(shapes, adam)
    g, v = [torch.full((100,), value)], [torch.zeros(100) if value < 1 else torch.full((100,), 1e36)]
    assert_close(run_torch(theta, g, v, SCALE, adam=adams), want(theta, g, v, adams))


def test_weights_may_be_perturbed_in_place():
    theta, g, v, adam = problem()
    oracle = want(theta, g, v, adam)
    assert all(x is y for x, y in zip(run_torch(theta, g, v, SCALE, adam=adam, out=theta), theta, strict=True))
    assert_close(theta, oracle)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [3, 1000, 2**18 + 1])
def test_a_bad_gradient_reaches_no_other_weight(n, bad):
    theta, g, v, adam = problem([(n,), (5,)], settings_of(2, True))
    g[0][n // 2] = bad
    got = run_torch(theta, g, v, SCALE, adam=adam)
    assert torch.isnan(got[0]).nonzero().tolist() == [[n // 2]]
    assert torch.isfinite(got[1]).all()


def test_weights_in_any_layout_keep_it():
    theta, g, v, adam = problem([(6, 8)] * 4)
    turned = lambda x: x.view(2, 3, 8).permute(2, 0, 1)
    theta = [theta[0].T, theta[1][:, ::2], turned(theta[2]), turned(theta[3])]
    g = [g[0].T, g[1][:, 1::2], turned(g[2]), turned(g[3]).contiguous()]
    v = [v[0].T.contiguous(), v[1][:, ::2], turned(v[2]), turned(v[3])]
    got = run_torch(theta, g, v, SCALE, adam=adam)
    assert_close(got, want(theta, g, v, adam))
    assert [got[i].stride() for i in (0, 2, 3)] == [theta[i].stride() for i in (0, 2, 3)]


@pytest.mark.parametrize("n", [1, 7, 4096, 2**18 + 3])
def test_random_rounding_is_that_of_the_oracle(n):
    theta, g = [torch.zeros(3), torch.randn(n) * 3], [torch.zeros(3), torch.zeros(n)]
    got = run_torch(theta, g, None, SCALE, dtype=torch.bfloat16, rounding=Rounding(True, seed=7, step=3))
    assert np.array_equal(back(got[1]), spec.rounded_at_random(theta[1].numpy(), seed=7, step=3, tensor=1))


def drawn(n: int = 2**17, **draw) -> np.ndarray:
    return spec.random_bits(n, **{"seed": 1, "step": 1, "tensor": 0, **draw}).astype(np.int64)


@pytest.mark.parametrize("draw", [{}, {"seed": -5}, {"step": 10**6}, {"tensor": 2999}, {"stream": "copy"}])
def test_the_bits_are_spread_evenly(draw):
    bits, n = drawn(**draw), 2**17
    counts = np.bincount(bits >> 8, minlength=256)  # χ² of 255 degrees of freedom: 255 ± 23
    assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 6 * np.sqrt(2 * 255)
    for i in range(16):
        assert abs((bits >> i & 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


def test_draws_with_different_keys_are_independent():
    n, base = 2**17, drawn()
    others = [
        drawn(seed=2),
        drawn(step=2),
        drawn(tensor=1),
        drawn(stream="exp_avg"),
        np.roll(base, 1),
        np.roll(base, 2),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(n)
        assert abs((base == other).mean() - 2**-16) < 6 * np.sqrt(2**-16 / n)
    assert np.array_equal(base, drawn())


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_random_rounding_has_right_mean_and_neighbours(part):
    n = 2**17
    theta = [torch.full((n,), -(1 + part * 2**-7))]
    rounding = Rounding(True, seed=3, step=9)
    got = run_torch(theta, [torch.zeros(n)], None, SCALE, dtype=torch.bfloat16, rounding=rounding)[0]
    assert set(got.tolist()) == {-1.0, -(1 + 2**-7)}
    share = float((got != -1).double().mean())
    assert abs(share - part) < 5 * np.sqrt(part * (1 - part) / n)


def test_random_rounding_keeps_exact_values_infinities_and_nans():
    x = torch.tensor([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan] * 100)
    x[5::12] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN all in the bits cut off
    zero = [torch.zeros_like(x)]
    got = run_torch([x], zero, None, torch.tensor(0.0), dtype=torch.bfloat16, rounding=Rounding(True, 1, 1))[0]
    assert np.array_equal(back(got), back(x), equal_nan=True)


def test_bfloat16_perturbation_arrives_from_masters_alone():
    """ρ = 0.05 over 10^6 weights ~ N(0, 0.02²): the projection of what is written on ε."""
    make = torch.Generator().manual_seed(0)
    theta, g = [torch.randn(10**6, generator=make) * 0.02], [torch.randn(10**6, generator=make)]
    scale = 0.05 / g[0].norm()
    epsilon = (scale * g[0]).double()

    def arrived(before: torch.Tensor, after: torch.Tensor) -> float:
        return float((after.double() - before.double()) @ epsilon / (epsilon @ epsilon))

    half = theta[0].to(torch.bfloat16)
    masters = run_torch(theta, g, None, scale, dtype=torch.bfloat16)[0]
    random = run_torch(theta, g, None, scale, dtype=torch.bfloat16, rounding=Rounding(True, 1, 1))[0]
    assert abs(arrived(half, masters) - 1) < 0.02
    assert abs(arrived(half, random) - 1) < 0.04  # two roundings that are drawn apart
    in_place = half + (scale * g[0]).to(torch.bfloat16)
    assert abs(arrived(half, in_place) - 1) > 0.1


def test_lists_that_do_not_fit_are_refused():
    theta, g, v, adam = problem()
    with pytest.raises(ValueError, match="scale: one for each of the 5 tensors or one for all, got 2"):
        run_torch(theta, g, v, torch.ones(2), adam=adam)
    with pytest.raises(ValueError, match="at random is to bfloat16 alone"):
        run_torch(theta, g, v, SCALE, adam=adam, dtype=torch.float16, rounding=Rounding(True))
