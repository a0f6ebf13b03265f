"""Forward-mode differentiation of the Flax decoder, against finite differences in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsam_trainers.models import flax_decoder
from fsam_trainers.models.layout import ModelConfig

V, ROWS, L = 11, 2, 5


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def problem(request):
    """(params, loss of them, a direction), in float64."""
    with jax.enable_x64(True):
        config = ModelConfig(2, 8, 2, L, V, tied=request.param)
        model = flax_decoder.Decoder(config)
        batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, V, (ROWS, L + 1)))}
        wide = lambda x: jnp.asarray(x, jnp.float64)
        params = jax.tree.map(wide, flax_decoder.parameters(config, 0))

        def loss(params):
            head = flax_decoder.features(model, params, batch, dtype=jnp.float64)
            z = head.hidden @ head.weight.T
            return -jax.nn.log_softmax(z)[jnp.arange(len(z)), head.labels].mean()

        draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
        yield params, jax.jit(loss), jax.tree.map(draw, params)  # op by op each would be compiled for itself


def along(function, params, direction, step: float = 1e-7):
    """The central difference of `function` along the direction."""
    at = lambda k: function(jax.tree.map(lambda p, d: p + k * d, params, direction))
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), at(step), at(-step))


def test_jvp_of_the_loss(problem):
    params, loss, direction = problem
    got = jax.jvp(loss, (params,), (direction,))[1]
    assert float(got) == pytest.approx(float(along(loss, params, direction)), rel=1e-6)


def test_hessian_vector_product_is_forward_over_reverse(problem):
    params, loss, direction = problem
    got = jax.jit(lambda p, d: jax.jvp(jax.grad(loss), (p,), (d,))[1])(params, direction)
    expected = along(jax.jit(jax.grad(loss)), params, direction)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.max(jnp.abs(b))) + 1e-9)


def test_hessian_of_one_leaf(problem):
    params, loss, _ = problem
    of = lambda scale: loss({**params, "final_norm": scale})
    got, scale = jax.hessian(of)(params["final_norm"]), params["final_norm"]
    rows = [along(jax.grad(of), scale, jnp.eye(len(scale))[i]) for i in range(len(scale))]
    np.testing.assert_allclose(got, jnp.stack(rows), atol=1e-7)
