"""The Vision Transformer in Flax, on the decoder's blocks (`flax_decoder`); `vit_layout` has its parameters."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsam_core.jax import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.jax.mesh import by_rows, in_use
from fsam_trainers.models.flax_decoder import Block, _fan_in, _normal, _normed, _zeros, applied, in_stages
from fsam_trainers.models.flax_mixed import product
from fsam_trainers.models.vit_layout import ViTConfig


class ViT(nn.Module):
    """Images -> (features h_BxD, head weight [V, D], head bias [V])."""

    config: ViTConfig
    remat: bool = False
    """Keep only each block's input for the backward pass, which recomputes the rest."""

    @nn.compact
    def __call__(
        self,
        pixels_BxHxWxC: jax.Array,
        *,
        deterministic: bool = True,
        dtype: Any = jnp.float32,
        x_NxD: jax.Array | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Any:
        """The result in `dtype`, as the arguments `x_NxD`, `first` and `last` say: see `flax_decoder.Decoder`."""
        c, (B, L) = self.config, (len(pixels_BxHxWxC), self.config.seq_len)
        if x_NxD is None:
            x_NxP = patches_of(by_rows(pixels_BxHxWxC), c.patch).astype(dtype)
            x_NxD = product("patches", x_NxP, self.param("patches", _fan_in, (x_NxP.shape[1], c.width)))
            x_NxD += self.param("patches_bias", _zeros, (c.width,)).astype(dtype)
            x_BxLxD = x_NxD.reshape(B, c.patches, c.width)
            if c.pool == "token":
                x_BxLxD = jnp.pad(x_BxLxD, ((0, 0), (1, 0), (0, 0)))
            positions_LxD = in_use("positions", self.param("positions", _normal, (L, c.width)))
            x_NxD = (x_BxLxD + positions_LxD).astype(dtype).reshape(B * L, c.width)
            x_NxD = nn.Dropout(c.dropout, deterministic=deterministic)(by_rows(x_NxD, sequences=B))
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for i in range(first, c.layers if last is None else last):
            x_NxD = block(c, name=f"block_{i}")(x_NxD, L, deterministic)
        if last is not None:
            return x_NxD
        x_BxLxD = _normed(self, "final_norm", x_NxD).reshape(B, L, c.width)
        h_BxD = x_BxLxD[:, 0] if c.pool == "token" else x_BxLxD.mean(1)
        w_VxD = in_use("head", self.param("head", _normal, (c.classes, c.width)).astype(dtype))
        return h_BxD, w_VxD, self.param("head_bias", _zeros, (c.classes,)).astype(dtype)


Model = ViT


def patches_of(pixels_BxHxWxC: jax.Array, patch: int) -> jax.Array:
    """Patches row by row, values in −1 … 1: float32 [B · patches, patch² · C]."""
    B, H, W, C = pixels_BxHxWxC.shape
    x = (pixels_BxHxWxC.astype(jnp.float32) / 127.5 - 1).reshape(B, H // patch, patch, W // patch, patch, C)
    return x.swapaxes(2, 3).reshape(-1, patch * patch * C)


def features(model: ViT, params: dict, batch: dict, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32) -> LinearHead:
    """The features function of `fsam_core.jax`; with batch["key"] dropout is on.

    batch: pixels [B, H, W, C] uint8; labels [B, K] int32 and weights [B, K] float32, an image's weighted rows.
    """
    return _head(applied(model, _inputs, params, batch, dtype=dtype), batch, loss)


def staged(model: ViT, blocks: int, loss: Loss = CROSS_ENTROPY, dtype: Any = jnp.float32) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""
    return in_stages(partial(applied, model, _inputs, dtype=dtype), blocks, partial(_head, loss=loss))


_inputs = itemgetter("pixels")


def _head(out: tuple[jax.Array, jax.Array, jax.Array], batch: dict, loss: Loss) -> LinearHead:
    h_BxD, w_VxD, bias_V = out
    labels_BxK = batch["labels"]
    h_NxD = jnp.repeat(h_BxD, labels_BxK.shape[1], axis=0)
    return LinearHead(h_NxD, w_VxD, labels_BxK.reshape(-1), batch["weights"].reshape(-1), bias_V, loss=loss)
