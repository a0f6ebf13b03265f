"""`preconditioned_norm` in every backend, against the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import BACKENDS, DTYPES, OPS, adam_of, back, rounded, to

import fsam_kernels.torch
import fsam_kernels.xla
from fsam_kernels import spec
from fsam_kernels.torch import direction_and_norm, preconditioned_norm

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
def test_non_finite_or_overflowing_gradient_shows(backend, adam, bad):
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
def test_arguments_are_unchanged(backend):
    (g, v), ops = tensors(), OPS[backend]
    gs, vs = [to(backend, x, "float32") for x in g], [to(backend, x, "float32") for x in v]
    ops.preconditioned_norm(gs, vs, clip=0.5, adam=adam_of(backend, settings_of(3, True), len(gs)))
    assert all(np.array_equal(a, back(b)) for a, b in zip(g + v, gs + vs, strict=True))


# --- with the direction written, on a CPU -----------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "per_tensor"), [(1.0, True), (0.3, False), (torch.tensor(0.3), True)])
@pytest.mark.parametrize(("current", "steps"), [(True, 0), (False, 1), (True, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_direction_and_its_norm_match_the_oracle(dtype, current, steps, clip, per_tensor):
    shapes = [*SHAPES, (0, 3), (2**18 + 7,)]  # an empty one, and one of more than a piece
    g, v = tensors(dtype, shapes)
    v = v if steps else [0 * x for x in v]
    adam = settings_of(steps, current)
    out = [torch.full(x.shape, torch.nan) for x in g]
    options = {"clip": clip, "adam": adam_of("torch", adam, len(g)), "out": out, "per_tensor": per_tensor}
    got = direction_and_norm([to("torch", x, dtype) for x in g], [to("torch", x, "float32") for x in v], **options)
    oracle = {"clip": float(clip), **adam}
    wanted, _ = spec.preconditioned_norm(g, v, **oracle, per_tensor=per_tensor)
    np.testing.assert_allclose(back(got), wanted, rtol=2.6e-5)  # of equal terms; see `SUMMED`
    for x, y, z in zip(out, g, v, strict=True):
        np.testing.assert_allclose(back(x), spec.direction(y, z, **oracle), rtol=8 * 2**-24, atol=0)


def test_direction_shows_non_finite_values():
    adam = adam_of("torch", settings_of(3, True), 2)
    out = [torch.empty(3), torch.empty(2)]
    v = [torch.zeros(3), torch.zeros(2)]
    total = direction_and_norm([torch.zeros(3), torch.zeros(2)], v, adam=adam, out=out)
    assert total == 0
    assert all(not x.any() for x in out)
    assert not torch.isfinite(direction_and_norm([torch.zeros(3), torch.tensor([1, torch.nan])], v, adam=adam, out=out))
    assert direction_and_norm([torch.zeros(3), torch.zeros(2)], v, adam=adam, out=out) == 0  # nothing is left of it


# --- trees, in JAX ----------------------------------------------------------------------------------------------------


def tree(arrays, dtype: str = "float32") -> dict:
    """The five arrays of `SHAPES` in nested containers, in the order that JAX has them."""
    a, b, c, d, e = (to("xla", x, dtype) for x in arrays)
    return {"a": a, "b": [b, {"c": c}], "d": (d, e)}


MASK = {"a": True, "b": [False, {"c": True}], "d": (True, False)}
MASKED = [True, False, True, True, False]


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("steps", [None, (3, True), (3, False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_and_sums_of_each_leaf_in_a_tree(dtype, steps, clip):
    g, v = tensors(dtype)
    adam = settings_of(*steps) if steps else None
    given = (tree(g, dtype), tree(v) if adam else None)
    options = {"clip": clip, "mask": MASK, "adam": adam_of("xla", adam, 5)}
    want = spec.preconditioned_norm(g, v if adam else None, clip=clip, mask=MASKED, per_tensor=True, **(adam or {}))
    got = fsam_kernels.xla.preconditioned_norm(*given, per_tensor=True, **options)
    assert jax.tree.structure(got[0]) == jax.tree.structure(got[1]) == jax.tree.structure(given[0])
    for column, oracle in zip(got, want, strict=True):
        np.testing.assert_allclose([float(x) for x in jax.tree.leaves(column)], oracle, rtol=FEW_ROUNDINGS)
    total = fsam_kernels.xla.preconditioned_norm(*given, **options)
    np.testing.assert_allclose([float(x) for x in total], np.sum(want, axis=1), rtol=FEW_ROUNDINGS)


def test_masked_leaf_adds_nothing_even_if_non_finite():
    g, v = tensors()
    g[1][:] = np.nan
    sums = fsam_kernels.xla.preconditioned_norm(
        tree(g), tree(v), adam=adam_of("xla", settings_of(3, True), 5), mask=MASK
    )
    assert np.isfinite([float(x) for x in sums]).all()
    nothing = jax.tree.map(lambda _: False, MASK)
    assert fsam_kernels.xla.preconditioned_norm(tree(g), mask=nothing) == (0, 0)


@pytest.mark.parametrize(("n", "steps"), [(1, None), (1000, (3, True)), (10**6, (3, False))])
def test_one_leaf_of_any_length(n, steps):
    adam = settings_of(*steps) if steps else None
    g, v = (x.numpy() for (x,) in listed([(n,)]))
    got = measure("xla", [g], [v] if adam else None, adam=adam)
    np.testing.assert_allclose(
        got, spec.preconditioned_norm([g], [v] if adam else None, **(adam or {})), rtol=FEW_ROUNDINGS
    )
    equal = [np.full(n, np.float32(0.1))]
    np.testing.assert_allclose(measure("xla", equal), spec.preconditioned_norm(equal, None), rtol=EQUAL_TERMS)


def test_an_empty_leaf_and_an_empty_tree():
    g, v, adam = [np.zeros((0, 3)), np.ones(2)], [np.zeros((0, 3)), np.ones(2)], settings_of(3, True)
    assert measure("xla", g, v, adam=adam) == measure("xla", g[1:], v[1:], adam=adam)
    assert fsam_kernels.xla.preconditioned_norm({}) == (0, 0)
    assert fsam_kernels.xla.preconditioned_norm({}, per_tensor=True) == ({}, {})


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ({"a": True}, r"mask: a tree like .* with 2 leaves; this one lacks \['b'\]"),
        ({"a": True, "b": True, "c": True}, r"mask: .* has \['c'\] besides"),
        ({"a": True, "b": 1.0}, "mask: a tree of True and False is needed, got a float in it"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_in_one_sentence(mask, why):
    g = {"a": jnp.ones(2), "b": jnp.ones(3)}
    for call in (
        fsam_kernels.xla.preconditioned_norm,
        lambda g, mask: fsam_kernels.xla.perturb(g, g, None, 1.0, mask=mask),
    ):
        with pytest.raises(ValueError, match=why):
            call(g, mask=mask)
    with pytest.raises(ValueError, match=r"v: a tree like .* lacks \['a'\]"):
        fsam_kernels.xla.preconditioned_norm(g, {"b": g["b"]})


def test_a_mask_has_to_be_known_when_the_program_is_traced():
    with pytest.raises(ValueError, match=r"mask: a tree of True and False is needed, got a .*Tracer"):
        jax.jit(lambda g, mask: fsam_kernels.xla.preconditioned_norm(g, mask=mask))(jnp.ones(3), jnp.array(True))


# --- many tensors, of any kind, in plain PyTorch ----------------------------------------------------------------------


def listed(shapes, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)
    g = [torch.randn(shape, generator=make) * 1e-2 for shape in shapes]
    return g, [(torch.rand(shape, generator=make) + 0.1) * 1e-4 for shape in shapes]


def norms(g, v=None, adam: dict | None = None, **options):
    adams = None if adam is None else [fsam_kernels.torch.Adam(**adam)] * len(g)
    return preconditioned_norm(g, v, adam=adams, **options)


def oracle(g, v, adam: dict | None = None, **options):
    return spec.preconditioned_norm([back(x) for x in g], v and [back(x) for x in v], **(adam or {}), **options)


# A float32 sum of equal terms rounds the same way again and again: 438 half units were seen over 2^16 of them.
EQUAL_TERMS = 600 * 2**-24


@pytest.mark.parametrize("n", [1, 2, 1000, 2**18, 2**18 + 1, 10**6])
@pytest.mark.parametrize("adam", [None, settings_of(3, True), settings_of(3, False)])
def test_one_tensor_of_any_length(n, adam):
    g, v = listed([(n,)])
    v = v if adam else None
    np.testing.assert_allclose(norms(g, v, adam), oracle(g, v, adam), rtol=FEW_ROUNDINGS)
    g = [torch.full((n,), 0.1)]
    np.testing.assert_allclose(norms(g), oracle(g, None), rtol=EQUAL_TERMS)


def test_three_thousand_tensors_some_empty():
    g, v = listed([(i % 7,) if i % 3 else () for i in range(3000)])
    adam = settings_of(3, True)
    np.testing.assert_allclose(norms(g, v, adam), oracle(g, v, adam), rtol=FEW_ROUNDINGS)
    each = norms(g, v, adam, per_tensor=True)
    assert each.d_sumsq.shape == (3000,)
    np.testing.assert_allclose(each.d_sumsq, oracle(g, v, adam, per_tensor=True)[0], rtol=FEW_ROUNDINGS)


@pytest.mark.parametrize("adam", [None, settings_of(3, True), settings_of(3, False)])
def test_masks_sums_of_each_tensor_and_of_the_gradient(adam):
    g, v = listed(SHAPES)
    v, mask = v if adam else None, [True, False, True, True, False]
    want = oracle(g, v, adam, mask=mask, per_tensor=True, clip=0.5)
    got = norms(g, v, adam, mask=mask, per_tensor=True, clip=0.5, gradient=True)
    np.testing.assert_allclose(got[:2], want, rtol=FEW_ROUNDINGS)
    squares = oracle(g, None, mask=mask, per_tensor=True, clip=0.5)[0]
    np.testing.assert_allclose(got.g_sumsq, squares, rtol=FEW_ROUNDINGS)
    assert got.d_sumsq[1] == got.g_dot_d[4] == 0
    np.testing.assert_allclose(norms(g, v, adam, mask=mask, clip=0.5), np.sum(want, axis=1), rtol=FEW_ROUNDINGS)
    assert norms(g, v, adam, mask=[False] * 5, gradient=True) == (0, 0, 0)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e18])
@pytest.mark.parametrize("current", [True, False])
def test_zero_denormal_and_huge_gradients(value, current):
    g, v = [torch.full((100,), value)], [torch.zeros(100) if value < 1 else torch.full((100,), 1e36)]
    adam = settings_of(3, current)
    np.testing.assert_allclose(norms(g, v, adam), oracle(g, v, adam), rtol=FEW_ROUNDINGS, atol=1e-37)


@pytest.mark.parametrize("clip", [0.0, 1e-20, 1e-7, 1e-6, 1e-3, 30.0])
@pytest.mark.parametrize("b2", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("current", [True, False])
def test_any_clip_factor_and_moment_decay(clip, b2, current):
    """On a CPU the factor goes to the moment, as 1 / c², as far as float32 has room for it."""
    g, v = listed([(1003,), (7,)])
    g, v = [x / max(clip, 1e-20) for x in g], v
    adam = {"b2": b2, "eps": 1e-8, "current": current, "correction": 1 - b2**5 if b2 < 1 else 1.0}
    want = oracle(g, v, adam, clip=clip, per_tensor=True)
    got = norms(g, v, adam, clip=clip, per_tensor=True, gradient=True)
    np.testing.assert_allclose(got[:2], want, rtol=FEW_ROUNDINGS)
    squares = oracle(g, None, clip=clip, per_tensor=True)[0]
    np.testing.assert_allclose(got.g_sumsq, squares, rtol=FEW_ROUNDINGS)


def test_a_factor_that_is_not_a_number_shows():
    g, v = listed(SHAPES)
    for adam in (None, settings_of(3, True), settings_of(3, False)):
        assert torch.isnan(torch.stack(norms(g, v, adam, clip=torch.tensor(np.nan), gradient=True))).all()


def test_views_that_are_unaligned_transposed_or_strided():
    whole_g, whole_v = listed([(40, 50)] * 2)
    adam = settings_of(3, True)
    views = [
        lambda x: x.view(-1)[1:],
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x.view(4, 10, 50).permute(2, 0, 1),
        lambda x: x.view(-1)[3:4].view(()),
    ]
    g, v = [f(whole_g[0]) for f in views], [f(whole_v[0]) for f in views]
    np.testing.assert_allclose(norms(g, v, adam), oracle(g, v, adam), rtol=FEW_ROUNDINGS)
    v = [x.contiguous() for x in v]  # g and v lie differently
    np.testing.assert_allclose(norms(g, v, adam), oracle(g, v, adam), rtol=FEW_ROUNDINGS)


def test_dtypes_and_settings_may_differ_by_tensor():
    g, v = listed([(30,)] * 4)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    g = [x.to(kind) for x, kind in zip(g, kinds, strict=True)]
    v = [x.to(kind) for x, kind in zip(v, kinds[:2] + kinds[:1] + kinds[3:], strict=True)]
    each = [settings_of(3, True), settings_of(3, False), {**settings_of(1, True), "b2": 0.0}, settings_of(2, True)]
    got = preconditioned_norm(g, v, adam=[fsam_kernels.torch.Adam(**x) for x in each])
    want = np.sum([oracle([x], [y], z) for x, y, z in zip(g, v, each, strict=True)], axis=0)
    np.testing.assert_allclose(got, want, rtol=FEW_ROUNDINGS)
    assert got.d_sumsq.dtype == torch.float64


def test_the_same_tensors_give_the_same_bits():
    g, v = listed([(2**18 + 5,), (77,)])
    first, second = (norms(g, v, settings_of(3, True)) for _ in range(2))
    assert first == second


def test_no_temporary_is_as_long_as_a_long_tensor():
    g, v = listed([(2**21,)])
    norms(g, v, settings_of(3, True), clip=0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        norms(g, v, settings_of(3, True), clip=0.5)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * 2**18


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_gradient_in_a_million_shows_in_its_sums(bad):
    g, v = listed([(10,), (10**6,)])
    g[1][777_777] = bad
    got = norms(g, v, settings_of(3, True), per_tensor=True, gradient=True)
    assert not torch.isfinite(torch.stack(got)[:2, 1]).any()
    assert torch.isfinite(torch.stack(got)[:, 0]).all()
    assert not np.isfinite(norms(g)).any()


def test_missing_moment_is_noticed():
    """The negative control: the previous moment in place of the current one."""
    g, v = listed(SHAPES)
    got = norms(g, v, {**settings_of(3, True), "current": False})
    assert abs(float(got[0]) / oracle(g, v, settings_of(3, True))[0] - 1) > 1e-3


def test_lists_that_do_not_fit_are_refused():
    g, v = listed([(3,), (4,)])
    adam = fsam_kernels.torch.Adam(**settings_of(3, True))
    with pytest.raises(ValueError, match="at least one gradient"):
        preconditioned_norm([])
    with pytest.raises(ValueError, match="adam: one for each of the 2 tensors is needed, got 1"):
        preconditioned_norm(g, v, adam=[adam])
    with pytest.raises(ValueError, match=r"have shapes \(3,\) and \(4,\)"):
        preconditioned_norm(g, v[::-1], adam=[adam] * 2)
