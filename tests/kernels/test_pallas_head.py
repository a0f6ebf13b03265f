"""The head of the `pallas` backend as a whole, in the TPU interpreter: chunks, pull-backs, autodiff, a mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from operations import OPS, back, head, to
from test_cross_entropy import oracle
from test_linear_cross_entropy import OPTIONS, SIXTEEN_ROWS, assert_all_as_good, problem, with_options

import fsam_kernels.pallas
import fsam_kernels.xla


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setitem(OPS, "pallas", fsam_kernels.pallas)


# The interpreter takes seconds for each program.
@pytest.mark.parametrize(
    ("dtype", "keep"), [pytest.param("float32", True, marks=pytest.mark.slow), ("bfloat16", False)], ids=str
)
def test_error_is_within_that_of_plain_code(dtype, keep):
    assert_all_as_good("pallas", dtype, problem(dtype, 30), keep=keep, chunk_bytes=SIXTEEN_ROWS)


def test_recomputed_cotangent_equals_the_kept_one():
    p = problem("bfloat16", 30)
    give = lambda *names: [to("pallas", getattr(p, x), "bfloat16") for x in names]
    args = *give("h", "w"), to("pallas", p.y), to("pallas", p.weights, "float32")
    moved = [to("pallas", x, "bfloat16") for x in p.moved[:2]]
    kept, made = (
        fsam_kernels.pallas.logit_vjp(fsam_kernels.pallas.linear_cross_entropy(*args, keep=keep)[2], *moved)
        for keep in (True, False)
    )
    for x, y in zip(kept[:2], made[:2], strict=True):
        assert np.array_equal(back(x), back(y))


def test_all_options_together():
    p = with_options(tuple(OPTIONS), scale=3)
    assert_all_as_good("pallas", "float32", p, keep=True, chunk_bytes=SIXTEEN_ROWS)


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_cross_entropy_and_its_gradients(reduction):
    p = problem(scale=2)
    h, w, y = to("xla", p.h, "float32"), to("xla", p.w, "float32"), to("xla", p.y)
    weights = None if reduction == "none" else to("xla", p.weights, "float32")
    f = lambda h, w: fsam_kernels.pallas.cross_entropy(h, w, y, weights, reduction=reduction)
    expected, grads = oracle(p, reduction)
    np.testing.assert_allclose(back(f(h, w)), expected, rtol=2e-5, atol=1e-6)
    for x, o in zip(jax.grad(lambda h, w: f(h, w).sum(), (0, 1))(h, w), grads, strict=True):
        np.testing.assert_allclose(back(x), o, rtol=1e-4, atol=2e-6 * np.abs(o).max())


# The interpreter of Pallas holds a device in a barrier for all others: on two cores under load four of them have
# come to a standstill, which XLA ends after a while with the whole process.
@pytest.mark.parametrize(
    ("backend", "keep"),
    [
        ("xla", True),
        ("xla", False),
        pytest.param("pallas", True, marks=pytest.mark.slow),
        pytest.param("pallas", False, marks=pytest.mark.slow),
    ],
)
def test_mesh_gives_the_result_of_one_device(backend, keep):
    p = problem(n=64, scale=2)
    plain = head("xla", "float32", p)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    give = lambda x: to(backend, x, None if x.dtype == int else "float32")
    place = lambda x, spec: jax.device_put(give(x), NamedSharding(mesh, spec))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    ops, options = OPS[backend], {"row_axes": ("data",), "chunk_bytes": SIXTEEN_ROWS // 2}

    @jax.jit
    def both(h, w, y, weights, h2, w2):
        loss, lse, z, base = ops.linear_cross_entropy(h, w, y, weights, gradient=True, keep=keep, **options)
        return loss, lse, base[:2], ops.logit_vjp(z, h2, w2, **options)[:2]

    with jax.set_mesh(mesh):
        placed = [place(x, s) for x, s in ((p.h, rows), (p.w, whole), (p.y, rows), (p.weights, rows))]
        got = both(*placed, place(p.moved[0], rows), place(p.moved[1], whole))
    for x, e in zip(jax.tree.leaves(got), [plain.loss_N, plain.lse_N, *plain.base, *plain.moved], strict=True):
        np.testing.assert_allclose(back(x), e, rtol=1e-4, atol=1e-6 * np.abs(e).max())


def test_row_axes_without_their_mesh_are_refused():
    p = problem()
    args = to("xla", p.h, "float32"), to("xla", p.w, "float32"), to("xla", p.y), to("xla", p.weights, "float32")
    with pytest.raises(ValueError, match=r"row_axes: the mesh in use has no axis data; it has none: call it under"):
        fsam_kernels.xla.linear_cross_entropy(*args, row_axes=("data",))
