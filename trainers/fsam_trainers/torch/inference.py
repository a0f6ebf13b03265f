"""A model without a training state, in PyTorch: its weights in a checkpoint, losses, logits, decoding with a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor

import fsam_core.torch as fsam
from fsam_kernels.options import Loss
from fsam_trainers.device import in_torch
from fsam_trainers.models import torch_decoder, torch_vit
from fsam_trainers.models.layout import ModelConfig, shapes
from fsam_trainers.models.torch_decoder import norm, plus, rotated, turn_of
from fsam_trainers.models.vit_layout import ViTConfig


def read(folder: Path, config: ModelConfig, *, averaged: bool) -> dict[str, np.ndarray]:
    """The weights by flat name in the state of a checkpoint, or their average; moments are not read."""
    prefix = "module." if averaged else ""
    weights = {prefix + name: torch.empty(shape) for name, shape in shapes(config).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load({"average" if averaged else "model": weights}, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): value.numpy() for name, value in weights.items()}


def window_losses(
    config: ModelConfig, weights: dict[str, np.ndarray], loss: Loss, windows_WxL1: np.ndarray
) -> np.ndarray:
    """The mean loss a token of each window, float64 [W], in float32 on the default device."""
    device = in_torch()
    model = torch_decoder.Decoder(config, weights=weights).eval().to(device)
    mean = fsam.mean_loss(partial(torch_decoder.features, loss=loss))
    rows = torch.from_numpy(np.asarray(windows_WxL1, np.int64)).to(device)
    return np.array([float(mean(model, row[None])) for row in rows])


def image_logits(config: ViTConfig, weights: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Images, uint8 [B, H, W, C] -> their logits, float32 [B, V], on the default device."""
    device = in_torch()
    model = torch_vit.ViT(config, weights=weights).eval().to(device)

    @torch.no_grad()
    def of(pixels_BxHxWxC: np.ndarray) -> np.ndarray:
        h_BxD, w_VxD, bias_V = model(torch.from_numpy(pixels_BxHxWxC).to(device))
        return (h_BxD @ w_VxD.T + bias_V).cpu().numpy()

    return of


class CachedDecoder:
    """The decoder on one sequence, which keeps the keys and values of the tokens it has read."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self._device = config, in_torch()
        self._weights = {name: torch.from_numpy(np.array(value)).to(self._device) for name, value in weights.items()}
        self._past: list[tuple[Tensor, Tensor]] = []

    def start(self, tokens: list[int]) -> np.ndarray:
        """Forget what was read, and read tokens, 1 to seq_len of them; the logits of the next one, float32 [V]."""
        self._past = []
        return self._logits(tokens, 0)

    def advance(self, token: int) -> np.ndarray:
        """Read one more token; the logits of the next one."""
        return self._logits([token], self._past[0][0].shape[1])

    @torch.no_grad()
    def _logits(self, tokens: list[int], start: int) -> np.ndarray:
        c, w, L = self.config, self._weights, len(tokens)
        x_LxD = w["embedding"][torch.tensor(tokens, device=self._device)]
        if not c.rotary:
            x_LxD = x_LxD + w["positions"][start : start + L]
        whole = turn_of(c, c.seq_len, self._device)
        turn = None if whole is None else (whole[0][start : start + L], whole[1][start : start + L])
        present = []
        for i in range(c.layers):
            block = f"block_{i}"
            h_LxD = self._normed(f"{block}.attention_norm", x_LxD)
            a_LxD, kept = self._attention(block, h_LxD, self._past[i] if start else None, turn)
            present.append(kept)
            x_LxD = x_LxD + a_LxD
            x_LxD = x_LxD + self._mlp(block, self._normed(f"{block}.mlp_norm", x_LxD))
        self._past = present
        h_D = self._normed("final_norm", x_LxD[-1:])[0]
        return (w["embedding" if c.tied else "head"] @ h_D).cpu().numpy()

    def _attention(
        self, block: str, h_LxD: Tensor, past: tuple[Tensor, Tensor] | None, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(attention's output [L, D], keys and values [K, T, d] up to these tokens)."""
        c, L = self.config, len(h_LxD)
        if c.heads == c.K:
            q_HxLxd, k_KxTxd, v_KxTxd = self._through(f"{block}.qkv", h_LxD).view(L, 3, -1, c.d).permute(1, 2, 0, 3)
        else:
            q_HxLxd = self._through(f"{block}.q", h_LxD).view(L, -1, c.d).transpose(0, 1)
            k_KxTxd, v_KxTxd = self._through(f"{block}.kv", h_LxD).view(L, 2, -1, c.d).permute(1, 2, 0, 3)
        if c.qk_norm:
            q_HxLxd, k_KxTxd = self._normed(f"{block}.q_norm", q_HxLxd), self._normed(f"{block}.k_norm", k_KxTxd)
        if turn is not None:
            q_HxLxd, k_KxTxd = rotated(q_HxLxd, *turn), rotated(k_KxTxd, *turn)
        if past is not None:
            k_KxTxd, v_KxTxd = torch.cat([past[0], k_KxTxd], 1), torch.cat([past[1], v_KxTxd], 1)
        a_HxLxd = F.scaled_dot_product_attention(
            q_HxLxd[None], k_KxTxd[None], v_KxTxd[None], is_causal=L > 1, enable_gqa=c.heads != c.K
        )[0]
        return self._through(f"{block}.attention_out", a_HxLxd.transpose(0, 1).reshape(L, -1)), (k_KxTxd, v_KxTxd)

    def _mlp(self, block: str, h_LxD: Tensor) -> Tensor:
        h_LxF = self._through(f"{block}.mlp_in", h_LxD)
        if self.config.swiglu:
            h_LxF = F.silu(self._through(f"{block}.mlp_gate", h_LxD)) * h_LxF
        else:
            h_LxF = F.gelu(h_LxF, approximate="tanh")
        return self._through(f"{block}.mlp_out", h_LxF)

    def _through(self, name: str, x_LxI: Tensor) -> Tensor:
        return plus(x_LxI @ self._weights[name], self._weights.get(f"{name}_bias"))

    def _normed(self, name: str, x_xD: Tensor) -> Tensor:
        return norm(self.config, name, x_xD, self._weights[name], self._weights.get(f"{name}_bias"))
