"""A model without a training state, in JAX: its weights in a checkpoint, losses, logits, decoding with a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

import fsam_core.jax as fsam
from fsam_kernels.options import Loss
from fsam_trainers.models import flax_decoder, flax_vit
from fsam_trainers.models.flax_decoder import flattened, nested, norm, rotated
from fsam_trainers.models.layout import ModelConfig, rotation, shapes
from fsam_trainers.models.vit_layout import ViTConfig


def read(folder: Path, config: ModelConfig, *, averaged: bool) -> dict[str, np.ndarray]:
    """The weights by flat name in the state of a checkpoint, or their average; moments are not read."""
    key = "average" if averaged else "params"
    like: Any = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes(config).items()}
    as_numpy: Any = dict.fromkeys(like, ocp.RestoreArgs(restore_type=np.ndarray))
    wanted = ocp.args.PyTreeRestore(
        item={key: nested(like)}, restore_args={key: nested(as_numpy)}, partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flattened(checkpointer.restore(folder.absolute(), args=wanted)[key])


def window_losses(
    config: ModelConfig, weights: dict[str, np.ndarray], loss: Loss, windows_WxL1: np.ndarray
) -> np.ndarray:
    """The mean loss a token of each window, float64 [W], in float32 on the default device."""
    mean = _mean_loss(config, loss)
    params = jax.tree.map(jnp.asarray, nested(weights))
    losses = [mean(params, {"tokens": row[None]}) for row in np.asarray(windows_WxL1, np.int32)]
    return np.array([float(x) for x in losses])


@lru_cache(maxsize=8)
def _mean_loss(config: ModelConfig, loss: Loss) -> Any:
    """Compiled once for all weights of these sizes."""
    return jax.jit(fsam.mean_loss(partial(flax_decoder.features, flax_decoder.Decoder(config), loss=loss)))


def image_logits(config: ViTConfig, weights: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Images, uint8 [B, H, W, C] -> their logits, float32 [B, V], on the default device."""
    params = jax.tree.map(jnp.asarray, nested(weights))
    return lambda pixels_BxHxWxC: np.asarray(_image_logits(config, params, pixels_BxHxWxC))


@partial(jax.jit, static_argnums=0)
def _image_logits(config: ViTConfig, params: dict, pixels_BxHxWxC: jax.Array) -> jax.Array:
    out: Any = flax_vit.ViT(config).apply({"params": params}, pixels_BxHxWxC)
    h_BxD, w_VxD, bias_V = out
    return h_BxD @ w_VxD.T + bias_V


class CachedDecoder:
    """The decoder on one sequence, which keeps the keys and values of the tokens it has read.

    Its arrays have fixed shapes, so that two programs are compiled: one for whole prompts, padded, and one for a token.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self._weights = {name: jnp.asarray(value) for name, value in weights.items()}
        self._run = jax.jit(partial(_logits, config))
        self._past: Any = None
        self._length = 0

    def start(self, tokens: list[int]) -> np.ndarray:
        """Forget what was read, and read tokens, 1 to seq_len of them; the logits of the next one, float32 [V]."""
        c = self.config
        self._past = jnp.zeros((c.layers, 2, c.K, c.seq_len, c.d))
        self._length = 0
        # The keys of the padding are masked until a token replaces them.
        return self._read(np.pad(tokens, (0, c.seq_len - len(tokens))), len(tokens))

    def advance(self, token: int) -> np.ndarray:
        """Read one more token; the logits of the next one."""
        return self._read(np.array([token]), 1)

    def _read(self, tokens_L: np.ndarray, count: int) -> np.ndarray:
        logits_V, self._past = self._run(self._weights, self._past, tokens_L, self._length, count - 1)
        self._length += count
        return np.asarray(logits_V)


def _logits(
    c: ModelConfig, w: dict[str, jax.Array], past: jax.Array, tokens_L: jax.Array, start: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(logits after tokens_L[last], keys and values [layers, 2, K, T, d] with those of the tokens from `start` on)."""
    L, T = len(tokens_L), c.seq_len

    def through(name: str, x_LxI: jax.Array) -> jax.Array:
        return x_LxI @ w[name] + w.get(f"{name}_bias", 0)

    def normed(name: str, x_xD: jax.Array) -> jax.Array:
        return norm(c, name, x_xD, w[name], w.get(f"{name}_bias"))

    positions_L = start + jnp.arange(L)
    seen_LxT = jnp.arange(T) <= positions_L[:, None]
    turn = [jnp.asarray(x)[positions_L] for x in rotation(c.d, c.rope_theta, T)] if c.rotary else None

    def attention(block: str, h_LxD: jax.Array, past: jax.Array, i: int) -> tuple[jax.Array, jax.Array]:
        if c.heads == c.K:
            q_HxLxd, k_KxLxd, v_KxLxd = through(f"{block}.qkv", h_LxD).reshape(L, 3, -1, c.d).transpose(1, 2, 0, 3)
        else:
            q_HxLxd = through(f"{block}.q", h_LxD).reshape(L, -1, c.d).transpose(1, 0, 2)
            k_KxLxd, v_KxLxd = through(f"{block}.kv", h_LxD).reshape(L, 2, -1, c.d).transpose(1, 2, 0, 3)
        if c.qk_norm:
            q_HxLxd, k_KxLxd = normed(f"{block}.q_norm", q_HxLxd), normed(f"{block}.k_norm", k_KxLxd)
        if turn is not None:
            q_HxLxd, k_KxLxd = rotated(q_HxLxd, *turn), rotated(k_KxLxd, *turn)
        past = jax.lax.dynamic_update_slice(past, jnp.stack([k_KxLxd, v_KxLxd])[None], (i, 0, 0, start, 0))
        k_KxTxd, v_KxTxd = past[i]
        # The heads of queries that share a key are rows of one product: R = L H / K.
        scores_KxRxT = q_HxLxd.reshape(c.K, -1, c.d) @ k_KxTxd.swapaxes(1, 2) * c.d**-0.5
        p_KxRxT = jax.nn.softmax(jnp.where(jnp.tile(seen_LxT, (c.heads // c.K, 1)), scores_KxRxT, -jnp.inf))
        a_HxLxd = (p_KxRxT @ v_KxTxd).reshape(c.heads, L, c.d)
        return through(f"{block}.attention_out", a_HxLxd.transpose(1, 0, 2).reshape(L, -1)), past

    def mlp(block: str, h_LxD: jax.Array) -> jax.Array:
        h_LxF = through(f"{block}.mlp_in", h_LxD)
        h_LxF = nn.silu(through(f"{block}.mlp_gate", h_LxD)) * h_LxF if c.swiglu else nn.gelu(h_LxF)
        return through(f"{block}.mlp_out", h_LxF)

    x_LxD = w["embedding"][tokens_L]
    if not c.rotary:
        x_LxD += w["positions"][positions_L]
    for i in range(c.layers):
        block = f"block_{i}"
        a_LxD, past = attention(block, normed(f"{block}.attention_norm", x_LxD), past, i)
        x_LxD += a_LxD
        x_LxD += mlp(block, normed(f"{block}.mlp_norm", x_LxD))
    h_D = normed("final_norm", x_LxD[last][None])[0]
    return w["embedding" if c.tied else "head"] @ h_D, past
