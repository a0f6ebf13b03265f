"""Half-float products whose weights' gradients are float32: values against float64, and that nothing rounds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsam_trainers.models import flax_decoder
from fsam_trainers.models.flax_decoder import flattened
from fsam_trainers.models.flax_mixed import product, rows_of
from fsam_trainers.models.layout import ModelConfig


def drawn(*shape, dtype=jnp.bfloat16) -> jax.Array:
    seed = np.random.SeedSequence([len(shape), *shape])
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exactly(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("name", "stored", "used"), [("mlp_in", (24, 40), (24, 40)), ("qkv", (24, 36), (24, 3, 12))])
def test_a_product_and_its_gradients(dtype, name, stored, used):
    x_NxI, w = drawn(130, 24, dtype=dtype), drawn(*stored, dtype=jnp.float32)
    ybar = drawn(130, *used[1:], dtype=dtype)
    y, back = jax.vjp(lambda x, w: product(name, x, w), x_NxI, w)
    xbar, wbar = back(ybar)
    assert (y.dtype, xbar.dtype, wbar.dtype) == (dtype, dtype, jnp.float32)
    assert wbar.shape == stored
    cast = exactly(w.astype(dtype)).reshape(used)
    near = {jnp.bfloat16: 2**-8, jnp.float16: 2**-10, jnp.float32: 1e-6}[dtype]
    largest = lambda x: near * np.abs(x).max()
    for got, wanted in (
        (y, np.tensordot(exactly(x_NxI), cast, 1)),
        (xbar, np.tensordot(exactly(ybar).reshape(130, -1), cast.reshape(24, -1), (1, 1))),
    ):
        np.testing.assert_allclose(exactly(got), wanted, atol=largest(wanted))
    of_w = np.tensordot(exactly(x_NxI), exactly(ybar).reshape(130, -1), (0, 0))
    np.testing.assert_allclose(exactly(wbar), of_w, atol=1e-6 * np.abs(of_w).max())


def test_rows_that_occur_often_are_summed_in_float32():
    w_VxD, index_N = drawn(7, 5, dtype=jnp.float32), jnp.asarray([3, 0, 3, 3, 6] * 60)
    xbar_NxD = drawn(300, 5)
    x_NxD, back = jax.vjp(lambda w: rows_of("embedding", w, index_N, jnp.bfloat16), w_VxD)
    assert x_NxD.dtype == jnp.bfloat16
    assert jnp.array_equal(x_NxD, w_VxD.astype(jnp.bfloat16)[index_N])
    wanted_VxD = np.zeros((7, 5))
    np.add.at(wanted_VxD, np.asarray(index_N), exactly(xbar_NxD))
    np.testing.assert_allclose(exactly(back(xbar_NxD)[0]), wanted_VxD, atol=1e-5)


@pytest.mark.slow
def test_no_gradient_of_the_decoder_is_rounded_but_the_heads():
    """The head's own is summed in float32 and rounded once, to the dtype that its weight has there."""
    config = ModelConfig(1, 12, 3, 7, 19, tied=False)
    model, params = flax_decoder.Decoder(config), flax_decoder.parameters(config, 0)
    batch = {"tokens": np.random.default_rng(0).integers(0, 19, (40, 8))}

    def rounded(entry) -> set[str]:
        """Of whose gradients every value is one of bfloat16's; not compiled, or XLA would leave roundings out."""

        def loss(params):
            out = flax_decoder.features(model, entry(params), batch, dtype=jnp.bfloat16)
            wide = lambda x: x.astype(jnp.float32)
            return -jax.nn.log_softmax(wide(out.hidden) @ wide(out.weight).T)[np.arange(280), out.labels].mean()

        found = flattened(jax.grad(loss)(params))
        return {name for name, g in found.items() if jnp.all(g == g.astype(jnp.bfloat16).astype(g.dtype))}

    assert rounded(lambda params: params) == {"head"}
    # Cast as a whole, every one of them is.
    assert rounded(lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)) == set(flattened(params))
