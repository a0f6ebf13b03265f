"""What devices send each other for the head, with rows over one axis of a mesh and the vocabulary over another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fsam_kernels.xla import linear_cross_entropy, logit_vjp
from fsam_profiling.tpu import collectives

N, D, V, CHUNKS = 64, 16, 128, 4
ROWS, WORDS = PartitionSpec("data"), PartitionSpec("tensor")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)  # conftest.py asks for four


def both_passes(keep, **options):
    def f(h, w, y, weights, h2, w2):
        _, lse, z, base = linear_cross_entropy(h, w, y, weights, gradient=True, keep=keep, **options)
        if not keep:
            z = z.reweighted(z.weights_N)
        return lse, base[:2], logit_vjp(z, h2, w2, **options)[:2]

    return f


def arguments():
    r = np.random.default_rng(0)
    h, h2 = r.normal(size=(2, N, D)).astype("float32")
    w, w2 = r.normal(size=(2, V, D)).astype("float32")
    return h, w, r.integers(-1, V, N, dtype=np.int32), r.random(N, dtype=np.float32) / N, h2, w2


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_rows_and_vocabulary_stay_on_their_devices(mesh, keep):
    on_a_device = N // 2 // CHUNKS * V * 8  # bytes of a chunk's float32 logits and operand
    options = {"chunk_bytes": on_a_device, "row_axes": ("data",)}
    args, specs = arguments(), (ROWS, WORDS, ROWS, ROWS, ROWS, WORDS)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        out = (NamedSharding(mesh, ROWS), (NamedSharding(mesh, ROWS), NamedSharding(mesh, WORDS)))
        compiled = jax.jit(both_passes(keep, **options), out_shardings=(*out, out[1])).lower(*placed).compile()
        got = compiled(*placed)
    for x, expected in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(both_passes(keep))(*args)), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-6 * float(jnp.abs(expected).max()))
    program = collectives.read(compiled.as_text())
    assert {x.kind for x in program} == {"all-reduce"}
    sums = [(shape, x.times) for x in program for _, shape in x.arrays if V // 2 in shape]
    assert sums == [((V // 2, D), 1)] * 2  # w̄ of each pass, once and not once a chunk
    others = [shape for x in program for _, shape in x.arrays if V // 2 not in shape]
    rows = N // 2 // CHUNKS
    assert {shape for shape in others if len(shape) == 2} <= {(rows, D), (rows, 1)}
    assert {x.times for x in program if (rows, D) in [shape for _, shape in x.arrays]} == {CHUNKS}
