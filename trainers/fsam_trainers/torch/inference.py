"""A model without a training state, in PyTorch: its weights in a checkpoint, losses, decoding with a cache."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor

import fsam_core.torch as fsam
from fsam_kernels.options import Loss
from fsam_trainers.models import torch_decoder
from fsam_trainers.models.layout import ModelConfig, shapes
from fsam_trainers.models.torch_decoder import layer_norm, plus


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
    device = _device()
    model = torch_decoder.Decoder(config, weights=weights).eval().to(device)
    mean = fsam.mean_loss(partial(torch_decoder.features, loss=loss))
    rows = torch.from_numpy(np.asarray(windows_WxL1, np.int64)).to(device)
    return np.array([float(mean(model, row[None])) for row in rows])


class CachedDecoder:
    """The decoder on one sequence, which keeps the keys and values of the tokens it has read."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self._device = config, _device()
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
        c, w = self.config, self._weights
        L, d = len(tokens), c.width // c.heads
        x_LxD = w["embedding"][torch.tensor(tokens, device=self._device)] + w["positions"][start : start + L]
        present = []
        for i in range(c.layers):
            h_LxD = self._normed(f"block_{i}.attention_norm", x_LxD)
            qkv_3xHxLxd = self._through(f"block_{i}.qkv", h_LxD).view(L, 3, c.heads, d).permute(1, 2, 0, 3)
            q_HxLxd, k_HxTxd, v_HxTxd = qkv_3xHxLxd
            if start:
                k_HxTxd = torch.cat([self._past[i][0], k_HxTxd], 1)
                v_HxTxd = torch.cat([self._past[i][1], v_HxTxd], 1)
            present.append((k_HxTxd, v_HxTxd))
            a_HxLxd = F.scaled_dot_product_attention(q_HxLxd[None], k_HxTxd[None], v_HxTxd[None], is_causal=L > 1)[0]
            x_LxD = x_LxD + self._through(f"block_{i}.attention_out", a_HxLxd.transpose(0, 1).reshape(L, -1))
            h_LxF = self._through(f"block_{i}.mlp_in", self._normed(f"block_{i}.mlp_norm", x_LxD))
            x_LxD = x_LxD + self._through(f"block_{i}.mlp_out", F.gelu(h_LxF, approximate="tanh"))
        self._past = present
        h_D = self._normed("final_norm", x_LxD[-1:])[0]
        return (w["embedding" if c.tied else "head"] @ h_D).cpu().numpy()

    def _through(self, name: str, x_LxI: Tensor) -> Tensor:
        return plus(x_LxI @ self._weights[name], self._weights.get(f"{name}_bias"))

    def _normed(self, name: str, x_LxD: Tensor) -> Tensor:
        w = self._weights
        return layer_norm(x_LxD, w[name], w.get(f"{name}_bias"), self.config.norm_eps)


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
