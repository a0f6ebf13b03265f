"""The decoder in Flax. Tokens are flattened to two dimensions before every projection.

On a CPU XLA runs a [N, D] × [D, E] product faster than the einsum over [B, L, D], and attention as a batched product
over B·H: in this project's first trials a 2.3M-parameter model took 0.30 s a step so, against 0.80 s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from fsam_core.jax import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.jax.mesh import by_rows, in_use
from fsam_trainers.models.flax_mixed import product, rows_of
from fsam_trainers.models.layout import EMBEDDING_STD, ModelConfig, has_bias, initial, is_rms, rotation

# {"block_0.qkv": x} -> {"block_0": {"qkv": x}}, flat names as a Flax tree, and back.
nested = partial(traverse_util.unflatten_dict, sep=".")
flattened = partial(traverse_util.flatten_dict, sep=".")

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
            tokens_BxL = by_rows(tokens_BxL)
            x_NxD = rows_of("embedding", embedding_VxD, tokens_BxL.reshape(-1), dtype)
            if not c.rotary:
                positions_LxD = in_use("positions", self.param("positions", _normal, (c.seq_len, c.width)))
                x_NxD = (x_NxD + jnp.tile(positions_LxD[:L], (B, 1))).astype(dtype)
            x_NxD = by_rows(x_NxD, sequences=B)
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


Model = Decoder


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream; `ModelConfig` names the variants."""

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
        if c.heads == c.K:
            qkv_Nx3xA = by_rows(through("qkv", h_NxD, D, 3 * c.heads * c.d), None, "tensor", sequences=B)
            q_BxHxLxd, k_BxKxLxd, v_BxKxLxd = qkv_Nx3xA.reshape(B, L, 3, -1, c.d).transpose(2, 0, 3, 1, 4)
        else:
            q_NxA = by_rows(through("q", h_NxD, D, c.heads * c.d), "tensor", sequences=B)
            q_BxHxLxd = q_NxA.reshape(B, L, -1, c.d).transpose(0, 2, 1, 3)
            kv_Nx2xE = by_rows(through("kv", h_NxD, D, 2 * c.K * c.d), None, "tensor", sequences=B)
            k_BxKxLxd, v_BxKxLxd = kv_Nx2xE.reshape(B, L, 2, -1, c.d).transpose(2, 0, 3, 1, 4)
        if c.qk_norm:
            q_BxHxLxd, k_BxKxLxd = _normed(self, "q_norm", q_BxHxLxd), _normed(self, "k_norm", k_BxKxLxd)
        if c.rotary:
            turn = rotation(c.d, c.rope_theta, L)
            q_BxHxLxd, k_BxKxLxd = rotated(q_BxHxLxd, *turn), rotated(k_BxKxLxd, *turn)
        a_NxA = by_rows(attention(q_BxHxLxd, k_BxKxLxd, v_BxKxLxd, causal=c.CAUSAL), "tensor", sequences=B)
        x_NxD += by_rows(drop(through("attention_out", a_NxA, c.heads * c.d, D)), sequences=B)

        h_NxD = _normed(self, "mlp_norm", x_NxD)
        if c.swiglu:
            h_NxF = nn.silu(through("mlp_gate", h_NxD, D, c.F)) * through("mlp_in", h_NxD, D, c.F)
        else:
            h_NxF = nn.gelu(through("mlp_in", h_NxD, D, c.F))
        h_NxF = by_rows(h_NxF, "tensor", sequences=B)
        return x_NxD + by_rows(drop(through("mlp_out", h_NxF, c.F, D)), sequences=B)


def attention(q_BxHxLxd: jax.Array, k_BxKxLxd: jax.Array, v_BxKxLxd: jax.Array, *, causal: bool) -> jax.Array:
    """Softmax attention, [B·L, H d]; scores in the input's dtype, softmax in float32. K of H heads are of keys."""
    B, H, L, d = q_BxHxLxd.shape
    K = k_BxKxLxd.shape[1]
    # The heads of queries that share a key are rows of one product: R = L H / K.
    q_BxKxRxd = q_BxHxLxd.reshape(B, K, -1, d)
    scores_BxKxRxL = jnp.matmul(q_BxKxRxd, k_BxKxLxd.swapaxes(-1, -2)) * d**-0.5
    upcast_BxKxRxL = scores_BxKxRxL.astype(jnp.promote_types(scores_BxKxRxL.dtype, jnp.float32))
    if causal:
        mask_RxL = jnp.tile(jnp.tril(jnp.ones((L, L), bool)), (H // K, 1))
        upcast_BxKxRxL = jnp.where(mask_RxL, upcast_BxKxRxL, -jnp.inf)
    p_BxKxRxL = jax.nn.softmax(upcast_BxKxRxL, axis=-1).astype(q_BxHxLxd.dtype)
    a_BxHxLxd = jnp.matmul(p_BxKxRxL, v_BxKxLxd).reshape(B, H, L, d)
    return a_BxHxLxd.transpose(0, 2, 1, 3).reshape(B * L, H * d)


def rotated(x_xLxd: jax.Array, cos_LxE: Any, sin_LxE: Any) -> jax.Array:
    """Pairs (x_i, x_{i + d/2}) of the last axis turned by the angles of their positions, in float32 or wider."""
    a_xLxE, b_xLxE = jnp.split(x_xLxd.astype(jnp.promote_types(x_xLxd.dtype, jnp.float32)), 2, axis=-1)
    turned = a_xLxE * cos_LxE - b_xLxE * sin_LxE, b_xLxE * cos_LxE + a_xLxE * sin_LxE
    return jnp.concatenate(turned, axis=-1).astype(x_xLxd.dtype)


def norm(c: ModelConfig, name: str, x_xD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None = None) -> jax.Array:
    """The norm of this name over the last axis: x / sqrt(mean x² + eps) · scale, or a layer norm."""
    if not is_rms(c, name):
        return layer_norm(x_xD, scale_D, bias_D, c.norm_eps)
    upcast_xD = x_xD.astype(jnp.promote_types(x_xD.dtype, jnp.float32))
    y_xD = upcast_xD * jax.lax.rsqrt(jnp.square(upcast_xD).mean(axis=-1, keepdims=True) + c.norm_eps)
    return (y_xD * scale_D).astype(x_xD.dtype)


def layer_norm(x_NxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """(x − mean) / sqrt(var + eps) · scale + bias, in float32 or wider."""
    upcast_NxD = x_NxD.astype(jnp.promote_types(x_NxD.dtype, jnp.float32))
    centred = upcast_NxD - upcast_NxD.mean(axis=-1, keepdims=True)
    y_NxD = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps) * scale_D
    return (y_NxD if bias_D is None else y_NxD + bias_D).astype(x_NxD.dtype)


def _normed(module: Any, name: str, x_xD: jax.Array) -> jax.Array:
    """The norm of this name in a module."""
    D = x_xD.shape[-1]
    return norm(module.config, name, x_xD, module.param(name, _ones, (D,)), _bias(module, name, D))


def _bias(module: Any, name: str, size: int) -> jax.Array | None:
    return module.param(f"{name}_bias", _zeros, (size,)) if has_bias(module.config, name) else None


def features(
    model: Decoder, params: dict, batch: dict, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32
) -> LinearHead:
    """The features function of `fsam_core.jax`: batch["tokens"] is [B, L+1]; with batch["key"] dropout is on.

    A negative token is context: the input ~token, and no target.

    The params are cast to `dtype` where they are used (`flax_mixed`), so whatever is made of them (perturbed ones,
    gradients) is float32 from there on.
    """
    return _head(applied(model, _inputs, params, batch, dtype=dtype), batch, loss)


def staged(model: Decoder, blocks: int, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""
    return in_stages(partial(applied, model, _inputs, dtype=dtype), blocks, partial(_head, loss=loss))


def in_stages(of: Callable[..., Any], blocks: int, head: Callable[[Any, dict], LinearHead]) -> Staged:
    """head(of(params, batch), batch) in two stages, `of` being `applied` of a model."""

    def prefix(params: dict, batch: dict) -> jax.Array:
        return of(params, batch, last=blocks)

    def suffix(params: dict, x_NxD: jax.Array, batch: dict) -> LinearHead:
        return head(of(params, batch, x_NxD=x_NxD, first=blocks), batch)

    return Staged(prefix, suffix)


def applied(model: nn.Module, inputs: Callable[[dict], jax.Array], params: dict, batch: dict, **options: Any) -> Any:
    """What the model makes of inputs(batch); with batch["key"] dropout is on."""
    rngs = {"dropout": batch["key"]} if "key" in batch else {}
    return model.apply({"params": params}, inputs(batch), deterministic=not rngs, rngs=rngs, **options)


def _inputs(batch: dict) -> jax.Array:
    tokens_BxL = batch["tokens"][:, :-1]
    return jnp.where(tokens_BxL < 0, ~tokens_BxL, tokens_BxL)


def _head(out: tuple[jax.Array, jax.Array], batch: dict, loss: Loss) -> LinearHead:
    h_NxD, w_VxD = out
    return LinearHead(h_NxD, w_VxD, batch["tokens"][:, 1:].reshape(-1), loss=loss)


def parameters(config: ModelConfig, seed: int) -> dict:
    """The initial parameters as a Flax tree of JAX arrays."""
    return jax.tree.map(jnp.asarray, nested(initial(config, seed)))
