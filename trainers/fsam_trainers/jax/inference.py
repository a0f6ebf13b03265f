"""A model without a training state, in JAX: its weights in a checkpoint, losses, decoding with a cache."""

from __future__ import annotations

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
from fsam_trainers.models import flax_decoder
from fsam_trainers.models.flax_decoder import layer_norm
from fsam_trainers.models.layout import ModelConfig, flattened, nested, shapes


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
        self._past = jnp.zeros((c.layers, 2, c.heads, c.seq_len, c.width // c.heads))
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
    """(logits after tokens_L[last], keys and values [layers, 2, H, T, d] with those of the tokens from `start` on)."""
    L, T, d = len(tokens_L), c.seq_len, c.width // c.heads

    def through(name: str, x_LxI: jax.Array) -> jax.Array:
        return x_LxI @ w[name] + w.get(f"{name}_bias", 0)

    def normed(name: str, x_LxD: jax.Array) -> jax.Array:
        return layer_norm(x_LxD, w[name], w.get(f"{name}_bias"), c.norm_eps)

    positions_L = start + jnp.arange(L)
    seen_LxT = jnp.arange(T) <= positions_L[:, None]
    x_LxD = w["embedding"][tokens_L] + w["positions"][positions_L]
    for i in range(c.layers):
        qkv_Lx3D = through(f"block_{i}.qkv", normed(f"block_{i}.attention_norm", x_LxD))
        q_HxLxd, *kv_HxLxd = qkv_Lx3D.reshape(L, 3, c.heads, d).transpose(1, 2, 0, 3)
        past = jax.lax.dynamic_update_slice(past, jnp.stack(kv_HxLxd)[None], (i, 0, 0, start, 0))
        k_HxTxd, v_HxTxd = past[i]
        scores_HxLxT = q_HxLxd @ k_HxTxd.swapaxes(1, 2) * d**-0.5
        p_HxLxT = jax.nn.softmax(jnp.where(seen_LxT, scores_HxLxT, -jnp.inf))
        x_LxD += through(f"block_{i}.attention_out", (p_HxLxT @ v_HxTxd).transpose(1, 0, 2).reshape(L, -1))
        h_LxF = through(f"block_{i}.mlp_in", normed(f"block_{i}.mlp_norm", x_LxD))
        x_LxD += through(f"block_{i}.mlp_out", nn.gelu(h_LxF))
    h_D = normed("final_norm", x_LxD[last][None])[0]
    return w["embedding" if c.tied else "head"] @ h_D, past
