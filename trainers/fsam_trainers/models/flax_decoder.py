"""The decoder in Flax. Tokens are flattened to two dimensions before every projection.

On a CPU XLA runs a [N, D] × [D, E] product faster than the einsum over [B, L, D], and attention as a batched product
over B·H: in this project's first trials a 2.3M-parameter model took 0.30 s a step so, against 0.80 s.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsam_core.jax import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.jax.mesh import by_rows, in_use
from fsam_trainers.models.flax_mixed import product, rows_of
from fsam_trainers.models.layout import EMBEDDING_STD, ModelConfig, initial, nested

_ones, _zeros, _normal = nn.initializers.ones, nn.initializers.zeros, nn.initializers.normal(EMBEDDING_STD)
_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Decoder(nn.Module):
    """Tokens [B, L] -> (last hidden states h_NxD with N = B·L, head weight w_VxD)."""

    config: ModelConfig
    remat: bool = False
    """Keep only each block's input for the backward pass, which recomputes the rest."""

    @nn.compact
    def __call__(
        self,
        tokens_BxL: jax.Array,
        *,
        deterministic: bool = True,
        dtype: Any = jnp.float32,
        x_NxD: jax.Array | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Any:
        """(last hidden states [N, D], head weight [V, D]), both in `dtype`.

        Of the blocks from `first` to before `last` alone, where these are given: from the residual stream x before
        them, and to the one after them.
        """
        c = self.config
        B, L = tokens_BxL.shape
        embedding_VxD = self.param("embedding", _normal, (c.vocab_size, c.width))
        if x_NxD is None:
            positions_LxD = in_use("positions", self.param("positions", _normal, (c.seq_len, c.width)))
            tokens_BxL = by_rows(tokens_BxL)
            x_NxD = rows_of("embedding", embedding_VxD, tokens_BxL.reshape(-1), dtype)
            x_NxD = by_rows((x_NxD + jnp.tile(positions_LxD[:L], (B, 1))).astype(dtype), sequences=B)
            x_NxD = nn.Dropout(c.dropout, deterministic=deterministic)(x_NxD)
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for i in range(first, c.layers if last is None else last):
            x_NxD = block(c, name=f"block_{i}")(x_NxD, L, deterministic)
        if last is not None:
            return x_NxD
        h_NxD = _normed(self, "final_norm", x_NxD)
        if c.tied:
            return h_NxD, in_use("embedding", embedding_VxD.astype(dtype))
        return h_NxD, in_use("head", self.param("head", _normal, (c.vocab_size, c.width)).astype(dtype))


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: jax.Array, L: int, deterministic: bool) -> jax.Array:
        c, D = self.config, self.config.width
        B = len(x_NxD) // L
        drop = nn.Dropout(c.dropout, deterministic=deterministic)

        def through(name: str, x: jax.Array, *shape: int) -> jax.Array:
            y = product(name, x, self.param(name, _fan_in, shape))
            bias = _bias(self, name, shape[-1])
            return y if bias is None else y + bias.astype(y.dtype).reshape(y.shape[1:])

        h_NxD = _normed(self, "attention_norm", x_NxD)
        qkv_Nx3xD = by_rows(through("qkv", h_NxD, D, 3 * D), None, "tensor", sequences=B)
        a_NxD = by_rows(causal_attention(qkv_Nx3xD, L, c.heads), "tensor", sequences=B)
        x_NxD += by_rows(drop(through("attention_out", a_NxD, D, D)), sequences=B)

        h_NxD = _normed(self, "mlp_norm", x_NxD)
        h_NxF = by_rows(nn.gelu(through("mlp_in", h_NxD, D, 4 * D)), "tensor", sequences=B)
        return x_NxD + by_rows(drop(through("mlp_out", h_NxF, 4 * D, D)), sequences=B)


def causal_attention(qkv_Nx3xD: jax.Array, L: int, heads: int) -> jax.Array:
    """Softmax attention over rows of L tokens, [N, 3, D] -> [N, D]; scores in the input's dtype, softmax in float32."""
    N, _, D = qkv_Nx3xD.shape
    B, d = N // L, D // heads
    q_BxHxLxd, k_BxHxLxd, v_BxHxLxd = qkv_Nx3xD.reshape(B, L, 3, heads, d).transpose(2, 0, 3, 1, 4)
    scores_BxHxLxL = jnp.matmul(q_BxHxLxd, k_BxHxLxd.swapaxes(-1, -2)) * d**-0.5
    mask_LxL = jnp.tril(jnp.ones((L, L), bool))
    wide_BxHxLxL = scores_BxHxLxL.astype(jnp.promote_types(scores_BxHxLxL.dtype, jnp.float32))
    p_BxHxLxL = jax.nn.softmax(jnp.where(mask_LxL, wide_BxHxLxL, -jnp.inf), axis=-1).astype(qkv_Nx3xD.dtype)
    return jnp.matmul(p_BxHxLxL, v_BxHxLxd).transpose(0, 2, 1, 3).reshape(N, D)


def layer_norm(x_NxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """(x − mean) / sqrt(var + eps) · scale + bias, in float32 or wider."""
    wide_NxD = x_NxD.astype(jnp.promote_types(x_NxD.dtype, jnp.float32))
    centred = wide_NxD - wide_NxD.mean(axis=-1, keepdims=True)
    y_NxD = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps) * scale_D
    return (y_NxD if bias_D is None else y_NxD + bias_D).astype(x_NxD.dtype)


def _normed(module: Any, name: str, x_NxD: jax.Array) -> jax.Array:
    """The layer norm of this name in a module."""
    D = x_NxD.shape[-1]
    return layer_norm(x_NxD, module.param(name, _ones, (D,)), _bias(module, name, D), module.config.norm_eps)


def _bias(module: Any, name: str, size: int) -> jax.Array | None:
    return module.param(f"{name}_bias", _zeros, (size,)) if module.config.biases else None


def features(
    model: Decoder, params: dict, batch: dict, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32
) -> LinearHead:
    """The features function of `fsam_core.jax`: batch["tokens"] is [B, L+1]; with batch["key"] dropout is on.

    A negative token is context: the input ~token, and no target.

    The params are cast to `dtype` where they are used (`flax_mixed`), so whatever is made of them (perturbed ones,
    gradients) is float32 from there on.
    """
    return _head(_applied(model, params, batch, dtype), batch, loss)


def staged(model: Decoder, blocks: int, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""

    def prefix(params: dict, batch: dict) -> jax.Array:
        return _applied(model, params, batch, dtype, last=blocks)

    def suffix(params: dict, x_NxD: jax.Array, batch: dict) -> LinearHead:
        return _head(_applied(model, params, batch, dtype, x_NxD=x_NxD, first=blocks), batch, loss)

    return Staged(prefix, suffix)


def _applied(model: Decoder, params: dict, batch: dict, dtype: Any, **part: Any) -> Any:
    rngs = {"dropout": batch["key"]} if "key" in batch else {}
    tokens_BxL = batch["tokens"][:, :-1]
    inputs_BxL = jnp.where(tokens_BxL < 0, ~tokens_BxL, tokens_BxL)
    return model.apply({"params": params}, inputs_BxL, deterministic=not rngs, rngs=rngs, dtype=dtype, **part)


def _head(out: tuple[jax.Array, jax.Array], batch: dict, loss: Loss) -> LinearHead:
    h_NxD, w_VxD = out
    return LinearHead(h_NxD, w_VxD, batch["tokens"][:, 1:].reshape(-1), loss=loss)


def parameters(config: ModelConfig, seed: int) -> dict:
    """The initial parameters as a Flax tree of JAX arrays."""
    return jax.tree.map(jnp.asarray, nested(initial(config, seed)))
