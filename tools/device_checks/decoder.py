"""The trainers' decoder without the trainers, whose module needs packages that an image may lack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsam_core.torch import LinearHead
from fsam_kernels.shapes import decoder
from fsam_trainers.models.layout import ModelConfig


class Decoder(nn.Module):
    """Tokens [B, L] -> (last hidden states [B·L, D], tied head weight [V, D]); pre-LN, GELU, no biases."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        self.config = config
        shapes = decoder(config.layers, config.width, config.vocab_size, config.seq_len)
        scales = [torch.ones(s, device=device) if len(s) == 1 else 0.02 * torch.randn(s, device=device) for s in shapes]
        self.weights = nn.ParameterList(scales)

    def forward(self, tokens_BxL: Tensor) -> tuple[Tensor, Tensor]:
        w_VxD, positions_LxD, *blocks, scale_D = self.weights
        x_BxLxD = F.embedding(tokens_BxL, w_VxD) + positions_LxD[: tokens_BxL.shape[1]]
        for start in range(0, len(blocks), 6):
            x_BxLxD = self._block(x_BxLxD, *blocks[start : start + 6])
        return _layer_norm(x_BxLxD, scale_D).flatten(0, 1), w_VxD

    def _block(self, x_BxLxD: Tensor, scale: Tensor, qkv: Tensor, out: Tensor, *mlp: Tensor) -> Tensor:
        B, L, D = x_BxLxD.shape
        heads = (_layer_norm(x_BxLxD, scale) @ qkv).view(B, L, 3, self.config.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, D)
        x_BxLxD = x_BxLxD + attended @ out
        scale, wide, narrow = mlp
        return x_BxLxD + F.gelu(_layer_norm(x_BxLxD, scale) @ wide, approximate="tanh") @ narrow


def features(model: nn.Module, tokens_BxL1: Tensor) -> LinearHead:
    h_NxD, w_VxD = model(tokens_BxL1[:, :-1])
    return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1))


def _layer_norm(x: Tensor, scale_D: Tensor) -> Tensor:
    return F.layer_norm(x, scale_D.shape, scale_D, None, 1e-6)
