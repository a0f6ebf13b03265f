"""The outline of nanodo's model, data and train step for docs/integrations.md, and the gradient by hand."""

from __future__ import annotations

import sys
import types
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from integrations_models import CLIP, RHO, L, V

PAD = 0


class Do(nn.Module):
    """A decoder whose embedding is in a box of logical axes and makes the logits."""

    @nn.compact
    def __call__(self, x_BxL: jax.Array) -> jax.Array:
        boxed = nn.with_partitioning(nn.initializers.normal(0.3), ("vocabulary", None))
        embed = nn.Embed(V, 32, embedding_init=boxed, name="embed")
        h_BxLxD = embed(x_BxL) + nn.Embed(L, 32, name="pos_embed")(jnp.arange(x_BxL.shape[1]))
        causal = nn.make_causal_mask(x_BxL)
        h_BxLxD += nn.MultiHeadDotProductAttention(4, use_bias=False)(nn.LayerNorm()(h_BxLxD), mask=causal)
        h_BxLxD += nn.Dense(32, use_bias=False)(nn.gelu(nn.Dense(48, use_bias=False)(nn.LayerNorm()(h_BxLxD))))
        return embed.attend(nn.LayerNorm(use_bias=False)(h_BxLxD))


def get_in_out(in_BxL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, labels, and a weight of 0 for a label that is padding."""
    y_BxL = jnp.pad(in_BxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    return in_BxL, y_BxL, (y_BxL != PAD).astype(jnp.float32)


def error(code: str) -> float:
    """Of the clipped gradient that the optimizer is given, over all leaves."""
    tokens = jax.random.randint(jax.random.key(0), (4, L), 1, V).at[0, 8:].set(PAD)
    model = Do()
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(1.0)), 1)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    package, data = types.ModuleType("nanodo"), types.ModuleType("nanodo.data")
    package.data, data.get_in_out = data, get_in_out  # type: ignore[attr-defined]
    names: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, {"nanodo": package, "nanodo.data": data}):
        exec(code, names)
        (_, _), grads = jax.jit(names["value_and_grad"])(state, tokens)
    updates, _ = jax.jit(tx.update)(grads, state.opt_state, state.params)
    return float(jax.jit(_apart)(updates, jax.jit(partial(_by_hand, model))(params, tokens)))


def _apart(updates: Any, expected: Any) -> jax.Array:
    """How far an update is from the one with the gradient that is expected, once that is clipped."""
    length = optax.global_norm(expected)
    expected = jax.tree.map(lambda x: x * jnp.minimum(1, CLIP / length), expected)
    return optax.global_norm(jax.tree.map(jnp.add, updates, expected)) / optax.global_norm(expected)


def _by_hand(model: Do, params: Any, tokens: jax.Array) -> Any:
    """∇ ⟨F(θ+ε), stop_gradient(∂L/∂z(θ))⟩ along ε = ρ g / ‖g‖."""
    x, y, weights = get_in_out(tokens)
    logits = lambda params: model.apply({"params": params}, x)

    def loss(z: jax.Array) -> jax.Array:
        each = optax.losses.softmax_cross_entropy_with_integer_labels(z, y)
        return (each * weights).sum() / weights.sum()

    zbar = jax.grad(loss)(logits(params))
    g = jax.grad(lambda params: (logits(params) * zbar).sum())(params)
    scale = RHO / optax.global_norm(g)
    return jax.grad(lambda params: (logits(params) * zbar).sum())(jax.tree.map(lambda p, d: p + scale * d, params, g))
