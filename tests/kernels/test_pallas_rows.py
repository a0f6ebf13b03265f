"""The Pallas stages of the head: interpreted, against the float64 oracle, and compiled for TPUs that are not here.

Blocks are small, so that every axis has two and a ragged tail: 37 rows in blocks of 24 (slabs of 16), 300 entries of
the vocabulary in blocks of 256 (two groups of lanes), 130 features.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from operations import assert_as_good, back

from fsam_kernels import spec
from fsam_kernels.options import Loss
from fsam_kernels.pallas import softmax_stats as pallas
from fsam_kernels.xla import softmax_stats as xla

C, D, V = 37, 130, 300
BLOCKS = pallas.Blocks(rows=24, vocabulary=256, slab=16)
PLAIN = Loss()
ALL = Loss(label_smoothing=0.1, z_loss=1e-3, soft_cap=20.0)


def problem(dtype="float32", scale=1.0, c=C, d=D, v=V, bias=False, seed=0):
    """h, w, b, labels of which every fifth is ignored; logits have the standard deviation `scale`."""
    random = np.random.default_rng(seed)
    h = jnp.asarray(random.normal(size=(c, d)) * scale, dtype)
    w = jnp.asarray(random.normal(size=(v, d)) / np.sqrt(d), dtype)
    labels = jnp.asarray(np.where(np.arange(c) % 5 == 4, -1, random.integers(0, v, c)))
    return h, w, jnp.asarray(random.normal(size=v), "float32") if bias else None, labels


@functools.partial(jax.jit, static_argnames=("loss", "tiles", "blocks", "races"))
def forward(h, w, b, labels, loss=PLAIN, *, tiles=True, blocks=BLOCKS, races=False):
    """The kernel, compiled once for each shape and option; looking for races doubles the time of that."""
    interpret = pltpu.InterpretParams(detect_races=races)
    return pallas.forward(h, w, b, labels, loss, tiles=tiles, blocks=blocks, interpret=interpret)


def figures(h, w, b, labels, loss, dtype="float32", **how):
    """(loss, lse, P) by the kernel."""
    rows, tiles = forward(h, w, b, labels, loss, **how)
    return rows.loss_C, rows.lse_C, pallas.operand(tiles, rows, labels, loss, dtype)


def plain_figures(h, w, b, labels, loss, dtype):
    """The same by the plain backend."""
    rows, tiles = xla.forward(h, w, b, labels, loss, tiles=True)
    return rows.loss_C, rows.lse_C, xla.operand(tiles, rows, labels, loss, dtype)


def check(dtype, h, w, b, labels, loss):
    """loss, lse and P are at most 3 times as far from the oracle as the plain backend in the same dtype."""
    got = figures(h, w, b, labels, loss, dtype)
    plain = plain_figures(h, w, b, labels, loss, dtype)
    wide = lambda x: None if x is None else back(x)
    oracle = spec.linear_cross_entropy(wide(h), wide(w), np.asarray(labels), bias_V=wide(b), loss=loss)
    for x, p, o, kind in zip(got, plain, oracle, ("float32", "float32", dtype), strict=True):
        # E is rounded before it is scaled, the plain P only after: two roundings instead of one.
        assert_as_good(back(x), back(p), o, kind)
    return got


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1), ("float32", 1000), ("bfloat16", 30)])
def test_error_is_within_that_of_the_plain_stages(dtype, scale):
    check(dtype, *problem(dtype, scale), PLAIN)


@pytest.mark.parametrize(
    "loss",
    [Loss(label_smoothing=0.1), Loss(z_loss=1e-3, soft_cap=20.0)],
    ids=["smoothing", "z-loss and soft-cap"],
)
def test_every_option_and_a_bias(loss):
    check("float32", *problem(scale=3, bias=True), loss)


@pytest.mark.parametrize(
    ("c", "d", "v"),
    [(1, 3, 1), pytest.param(48, 128, 512, marks=pytest.mark.slow)],
    ids=["one of each", "no tail"],
)
def test_other_sizes(c, d, v):
    check("float32", *problem(c=c, d=d, v=v, seed=3), PLAIN)


def test_confident_row_keeps_the_digits_of_its_loss():
    """The target's logit is 14 to 26 and the others' are about 0: losses from 1e-3 down to 1e-9."""
    _, w, b, _ = problem(bias=True)
    w, b = w / jnp.linalg.norm(w, axis=1, keepdims=True), 0 * b
    labels = jnp.arange(C) * 8
    h = w[labels] * jnp.linspace(14, 26, C)[:, None]
    rows, tiles = forward(h, w, b, labels)
    p = pallas.operand(tiles, rows, labels, PLAIN, jnp.float32)
    oracle, _, zbar = spec.linear_cross_entropy(back(h), back(w), np.asarray(labels))
    assert oracle.min() < 2e-8
    np.testing.assert_allclose(back(rows.loss_C), oracle, rtol=1e-4)
    at = np.arange(C), np.asarray(labels)
    np.testing.assert_allclose(back(p)[at], zbar[at], rtol=1e-4)


def test_ignored_rows_are_zero_and_their_lse_is_true():
    h, w, b, labels = problem(bias=True)
    loss, lse, p = figures(h, w, b, jnp.full_like(labels, -100), ALL)
    assert not back(loss).any()
    assert not back(p).any()
    oracle = spec.linear_cross_entropy(back(h), back(w), np.full(C, -100), bias_V=back(b), loss=ALL)[1]
    np.testing.assert_allclose(back(lse), oracle, rtol=1e-6)


@pytest.mark.parametrize("label", [V, 10**6])
def test_label_outside_the_vocabulary_is_nan_in_its_row(label):
    h, w, b, labels = problem()
    rows, _ = forward(h, w, b, labels.at[7].set(label))
    assert np.flatnonzero(np.isnan(back(rows.loss_C))).tolist() == [7]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_rows_with_a_late_maximum_are_recomputed(dtype):
    """The first 128 logits are 0 and a later one is 400: e^400 is no float32."""
    h, w, b, labels = problem(dtype, bias=True)
    w = w.at[:128].set(0)
    b = b.at[:128].set(0).at[200].set(400.0)
    labels = labels.at[3].set(200)
    check(dtype, h, w, b, labels, PLAIN)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_row_spoils_no_other(bad):
    h, w, b, labels = problem()
    clean, _ = forward(h, w, b, labels)
    rows, _ = forward(h.at[5, 3].set(bad), w, b, labels)
    assert np.flatnonzero(~np.isfinite(back(rows.loss_C))).tolist() == [5]
    others = np.arange(C) != 5
    assert np.array_equal(back(rows.loss_C)[others], back(clean.loss_C)[others])


@pytest.mark.slow
def test_statistics_depend_on_neither_tiles_nor_blocks():
    h, w, b, labels = problem(bias=True)
    with_tiles, tiles = forward(h, w, b, labels, ALL, races=True)
    without, none = forward(h, w, b, labels, ALL, tiles=False)
    whole, _ = forward(h, w, b, labels, ALL, tiles=False, blocks=None)
    assert none is None
    assert tiles.e_CxV.dtype == jnp.float32
    for x, y, z in zip(with_tiles, without, whole, strict=True):
        assert np.array_equal(back(x), back(y))
        np.testing.assert_allclose(back(z), back(x), rtol=1e-5, atol=1e-6)


def test_kept_cotangent_is_the_tiles():
    h, w, b, labels = problem("bfloat16")
    rows, tiles = forward(h, w, b, labels)
    assert tiles.e_CxV.dtype == jnp.bfloat16
    kept = pallas.keep(tiles, rows, labels, PLAIN, jnp.bfloat16)
    again, factor = pallas.scaled_kept(kept, rows, labels, PLAIN, jnp.bfloat16)
    expected, expected_factor = pallas.scaled_operand(tiles, rows, labels, PLAIN, jnp.bfloat16)
    assert np.array_equal(back(again), back(expected))
    assert np.array_equal(back(factor), back(expected_factor))


@pytest.mark.parametrize("loss", [ALL], ids=["all"])
def test_the_factor_left_outside_gives_the_same_cotangent(loss):
    h, w, b, labels = problem(scale=3)
    rows, tiles = forward(h, w, b, labels, loss)
    q, factor = pallas.scaled_operand(tiles, rows, labels, loss, jnp.float32)
    p = pallas.operand(tiles, rows, labels, loss, jnp.float32)
    seen = np.asarray(labels) >= 0
    np.testing.assert_allclose((back(q) * back(factor)[:, None])[seen], back(p)[seen], rtol=1e-5, atol=1e-9)
    assert not back(factor)[~seen].any()
    assert np.isfinite(back(q)).all()


def test_under_shard_map():
    h, w, _, labels = problem()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    of_rows, whole = PartitionSpec("data"), PartitionSpec()
    one = lambda h, w, y: forward(h, w, None, y)[0].loss_C
    inside = jax.shard_map(one, mesh=mesh, in_specs=(of_rows, whole, of_rows), out_specs=of_rows, check_vma=False)
    np.testing.assert_allclose(back(jax.jit(inside)(h, w, labels)), back(one(h, w, labels)), rtol=1e-6)


def test_a_wrong_kernel_is_caught(monkeypatch):
    """The checks above fail where the target is summed with the others, and where the ragged tail is not cut off."""
    args = problem("float32")
    monkeypatch.setattr(pallas, "_rows", _with_target)
    run = forward.__wrapped__
    monkeypatch.setitem(globals(), "forward", lambda *x, **how: jax.jit(lambda *y: run(*y, **how))(*x[:4]))
    with pytest.raises(AssertionError):
        check("float32", *args, PLAIN)


_true_rows = pallas._rows


def _with_target(ref, f, y, V, loss):
    summed = f.others_C + jnp.exp(f.target_C - ref)
    return _true_rows(ref, f._replace(others_C=summed), y, V, loss)


def test_blocks_fit_in_the_memory_of_every_chip():
    for capacity in (16 * 2**20, 64 * 2**20, 128 * 2**20):
        for features in (128, 1024, 4096):
            for itemsize in (2, 4):
                blocks = pallas.choose_blocks(features, itemsize, True, capacity)
                assert pallas.vmem_bytes(blocks, features, itemsize, True) < capacity
    with pytest.raises(ValueError, match="use backend xla"):
        pallas.choose_blocks(2**17, 4, True, 16 * 2**20)


@pytest.mark.compilers
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("chip", "most"), [("v5e", 1.05), pytest.param("v6e", 1.45, marks=pytest.mark.slow)])
def test_compiled_kernel_costs_little_more_than_its_product(chip, most):
    from fsam_profiling.tpu.compiler import compile_for

    n, d, v = 2048, 1024, 8192
    compiled = compile_for(chip, "fsam_profiling.tpu.head_programs:row_stats", options={"N": n, "D": d, "V": v})
    (kernel,) = (x for x in compiled.kernels if not x.excluded)
    assert kernel.schedule.mxu_cycles == pytest.approx(2 * n * d * v / compiled.chip.flops_per_cycle)
    assert kernel.schedule.cycles <= most * kernel.schedule.mxu_cycles
    assert kernel.schedule.assumed == 0
    assert kernel.bytes <= 1.05 * (2 * (n * d + n // 1024 * v * d + n * v) + 24 * n)
    assert kernel.schedule.vmem_bytes <= compiled.chip.vmem_bytes // 4
    assert compiled.excluded_cycles > kernel.cycles
