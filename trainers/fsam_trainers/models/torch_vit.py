"""The Vision Transformer in PyTorch, with the parameter layout of `vit_layout`, on the decoder's blocks."""

from __future__ import annotations

from functools import partial
from operator import itemgetter

import torch.nn.functional as F
from torch import Tensor, nn

from fsam_core.torch import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.models.torch_decoder import Stack, in_stages, normed, plus

Batch = dict[str, Tensor]
"""pixels [B, H, W, C] uint8; labels [B, K] int64; weights [B, K] float32"""


class ViT(Stack):
    """Images -> (features h_BxD, head weight [V, D], head bias [V])."""

    OWN = ("patches", "patches_bias", "positions", "final_norm", "final_norm_bias", "head", "head_bias")
    patches: Tensor
    patches_bias: Tensor
    positions: Tensor
    head: Tensor
    head_bias: Tensor

    def lower(self, pixels_BxHxWxC: Tensor, blocks: int) -> Tensor:
        c, B = self.config, len(pixels_BxHxWxC)
        x_NxP = patches_of(pixels_BxHxWxC, c.patch).to(self.patches.dtype)
        x_BxLxD = plus(x_NxP @ self.patches, self.patches_bias).view(B, c.patches, -1)
        if c.pool == "token":
            x_BxLxD = F.pad(x_BxLxD, (0, 0, 1, 0))
        x_NxD = (x_BxLxD + self.positions).reshape(B * c.seq_len, -1)
        return self._through(F.dropout(x_NxD, c.dropout, self.training), c.seq_len, range(blocks))

    def upper(self, x_NxD: Tensor, B: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        x_NxD = normed(self, "final_norm", self._through(x_NxD, c.seq_len, range(blocks, c.layers)))
        x_BxLxD = x_NxD.view(B, c.seq_len, c.width)
        return x_BxLxD[:, 0] if c.pool == "token" else x_BxLxD.mean(1), self.head, self.head_bias


Model = ViT


def patches_of(pixels_BxHxWxC: Tensor, patch: int) -> Tensor:
    """Patches row by row, values in −1 … 1: float32 [B · patches, patch² · C]."""
    B, H, W, C = pixels_BxHxWxC.shape
    x = (pixels_BxHxWxC.float() / 127.5 - 1).view(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(2, 3).reshape(-1, patch * patch * C)


def features(model: nn.Module, batch: Batch, loss: Loss = CROSS_ENTROPY) -> LinearHead:
    """The features function of `fsam_core.torch`; an image has as many weighted rows as labels."""
    return _head(model(batch["pixels"]), batch, loss)


def staged(blocks: int, loss: Loss = CROSS_ENTROPY) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""
    return in_stages(blocks, itemgetter("pixels"), partial(_head, loss=loss))


def _head(out: tuple[Tensor, Tensor, Tensor], batch: Batch, loss: Loss) -> LinearHead:
    h_BxD, w_VxD, bias_V = out
    labels_BxK = batch["labels"]
    h_NxD = h_BxD.repeat_interleave(labels_BxK.shape[1], 0) if labels_BxK.shape[1] > 1 else h_BxD
    return LinearHead(h_NxD, w_VxD, labels_BxK.reshape(-1), batch["weights"].reshape(-1), bias_V, loss=loss)
