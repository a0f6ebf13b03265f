"""The Vision Transformer in PyTorch, with the parameter layout of `vit_layout`, on the decoder's blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsam_core.torch import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.models.layout import initial, shapes
from fsam_trainers.models.torch_decoder import Block, load, normed, plus
from fsam_trainers.models.vit_layout import ViTConfig

Batch = dict[str, Tensor]
"""pixels [B, H, W, C] uint8; labels [B, K] int64; weights [B, K] float32"""


class ViT(nn.Module):
    """Images -> (features h_BxD, head weight [V, D], head bias [V]).

    weights: by flat name; None for initial ones, drawn by `seed`.
    """

    patches: Tensor
    patches_bias: Tensor
    positions: Tensor
    head: Tensor
    head_bias: Tensor

    def __init__(
        self, config: ViTConfig, seed: int = 0, *, remat: bool = False, weights: dict[str, np.ndarray] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        for i in range(config.layers):
            self.add_module(f"block_{i}", Block(config, remat=remat))
        for name, shape in shapes(config).items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        load(self, initial(config, seed) if weights is None else weights)

    def forward(self, pixels_BxHxWxC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.upper(self.lower(pixels_BxHxWxC, self.config.layers), self.config.layers)

    def lower(self, pixels_BxHxWxC: Tensor, blocks: int) -> Tensor:
        """The residual stream x_NxD above the first `blocks` blocks, N = B · L."""
        c, B = self.config, len(pixels_BxHxWxC)
        x_NxP = patches_of(pixels_BxHxWxC, c.patch).to(self.patches.dtype)
        x_BxLxD = plus(x_NxP @ self.patches, self.patches_bias).view(B, c.patches, -1)
        if c.pool == "token":
            x_BxLxD = F.pad(x_BxLxD, (0, 0, 1, 0))
        x_NxD = (x_BxLxD + self.positions).reshape(B * c.seq_len, -1)
        return self._through(F.dropout(x_NxD, c.dropout, self.training), range(blocks))

    def upper(self, x_NxD: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks, the norm and the pooling above `lower`, from its result."""
        c = self.config
        x_NxD = normed(self, "final_norm", self._through(x_NxD, range(blocks, c.layers)))
        x_BxLxD = x_NxD.view(-1, c.seq_len, c.width)
        return x_BxLxD[:, 0] if c.pool == "token" else x_BxLxD.mean(1), self.head, self.head_bias

    def _through(self, x_NxD: Tensor, which: range) -> Tensor:
        for i in which:
            x_NxD = self.get_submodule(f"block_{i}")(x_NxD, self.config.seq_len)
        return x_NxD


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

    def prefix(model: Any, batch: Batch) -> Tensor:
        return model.lower(batch["pixels"], blocks)

    def suffix(model: Any, x_NxD: Tensor, batch: Batch) -> LinearHead:
        return _head(model.upper(x_NxD, blocks), batch, loss)

    return Staged(prefix, suffix)


def _head(out: tuple[Tensor, Tensor, Tensor], batch: Batch, loss: Loss) -> LinearHead:
    h_BxD, w_VxD, bias_V = out
    labels_BxK = batch["labels"]
    h_NxD = h_BxD.repeat_interleave(labels_BxK.shape[1], 0) if labels_BxK.shape[1] > 1 else h_BxD
    return LinearHead(h_NxD, w_VxD, labels_BxK.reshape(-1), batch["weights"].reshape(-1), bias_V, loss=loss)


@torch.no_grad()
def logits(config: ViTConfig, weights: dict[str, np.ndarray], pixels_BxHxWxC: np.ndarray) -> np.ndarray:
    """float32 [B, V] of images, uint8, at these weights by flat name."""
    model = ViT(config, weights=weights).eval()
    h_BxD, w_VxD, bias_V = model(torch.from_numpy(pixels_BxHxWxC))
    return (h_BxD @ w_VxD.T + bias_V).numpy()
