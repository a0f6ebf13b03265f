"""The decoder in PyTorch, with the parameter layout of `layout.shapes`: matrices are [in, out], as in Flax."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fsam_core.torch import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.models.layout import ModelConfig, initial, shapes
from fsam_trainers.torch.mesh import entering, leaving, looked_up, own, own_heads


class Decoder(nn.Module):
    """Tokens [B, L] -> (last hidden states h_NxD with N = B·L, head weight w_VxD)."""

    def __init__(self, config: ModelConfig, seed: int = 0, *, remat: bool = False) -> None:
        super().__init__()
        self.config = config
        for i in range(config.layers):
            self.add_module(f"block_{i}", Block(config, remat=remat))
        self.embedding = _parameter(config, "embedding")
        self.positions = _parameter(config, "positions")
        self.final_norm = _parameter(config, "final_norm")
        if not config.tied:
            self.head = _parameter(config, "head")
        load(self, initial(config, seed))

    def forward(self, tokens_BxL: Tensor) -> tuple[Tensor, Tensor]:
        x_NxD = self.lower(tokens_BxL, self.config.layers)
        return self.upper(x_NxD, tokens_BxL.shape[1], self.config.layers)

    def lower(self, tokens_BxL: Tensor, blocks: int) -> Tensor:
        """The residual stream x_NxD above the first `blocks` blocks."""
        B, L = tokens_BxL.shape
        x_NxD = self._embedded(tokens_BxL.reshape(-1)) + self.positions[:L].repeat(B, 1)
        x_NxD = F.dropout(x_NxD, self.config.dropout, self.training)
        return self._through(x_NxD, L, range(blocks))

    def upper(self, x_NxD: Tensor, L: int, blocks: int) -> tuple[Tensor, Tensor]:
        """The blocks and the norm above `lower`, from its result."""
        x_NxD = self._through(x_NxD, L, range(blocks, self.config.layers))
        return layer_norm(x_NxD, self.final_norm), self.embedding if self.config.tied else self.head

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        """Rows of the embedding.

        Tied to the head it has a dense gradient from there, to which that of N rows is added: on a CPU in 0.1 ms
        (V = 32,768, D = 576, N = 1,024), where rows among zeros and a sum over V x D values take 9 ms, and 40 on new
        pages. On a GPU sparse gradients wait for the device; wrappers of several ranks do not know them.
        """
        if isinstance(self.embedding, DTensor):
            return looked_up(tokens_N, self.embedding)
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        sparse = self.config.tied and self.embedding.device.type == "cpu" and not ranks
        return F.embedding(tokens_N, self.embedding, sparse=sparse and not torch.compiler.is_compiling())

    def _through(self, x_NxD: Tensor, L: int, which: range) -> Tensor:
        for i in which:
            x_NxD = self.get_submodule(f"block_{i}")(x_NxD, L)
        return x_NxD


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and added to the residual stream.

    With `remat` its input alone is kept for the backward pass, which computes the rest again.
    """

    def __init__(self, config: ModelConfig, *, remat: bool = False) -> None:
        super().__init__()
        self.config, self.remat = config, remat
        self.attention_norm = _parameter(config, "block_0.attention_norm")
        self.qkv = _parameter(config, "block_0.qkv")
        self.attention_out = _parameter(config, "block_0.attention_out")
        self.mlp_norm = _parameter(config, "block_0.mlp_norm")
        self.mlp_in = _parameter(config, "block_0.mlp_in")
        self.mlp_out = _parameter(config, "block_0.mlp_out")

    def forward(self, x_NxD: Tensor, L: int) -> Tensor:
        # The checkpoint is inside the block: parameter names stay, and wrappers' hooks run outside it.
        if self.remat and torch.is_grad_enabled():
            return checkpoint(self._forward, x_NxD, L, use_reentrant=False)
        return self._forward(x_NxD, L)

    def compile(self, **options: Any) -> None:
        """As `Module.compile`, but inside the checkpoint: a graph that contains checkpoints takes no DTensors."""
        self._forward = torch.compile(self._forward, **options)  # type: ignore[method-assign]

    def _forward(self, x_NxD: Tensor, L: int) -> Tensor:
        N, D = x_NxD.shape
        B, d, drop = N // L, D // self.config.heads, self.config.dropout
        h_NxD = entering(layer_norm(x_NxD, self.attention_norm), self.qkv)
        qkv_Nx3D = h_NxD @ own_heads(self.qkv)
        q, k, v = qkv_Nx3D.view(B, L, 3, -1, d).permute(2, 0, 3, 1, 4)
        a_NxD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(N, -1)
        a_NxD = leaving(a_NxD @ own(self.attention_out), self.attention_out)
        x_NxD = x_NxD + F.dropout(a_NxD, drop, self.training)
        h_NxD = entering(layer_norm(x_NxD, self.mlp_norm), self.mlp_in)
        h_NxF = F.gelu(h_NxD @ own(self.mlp_in), approximate="tanh")
        return x_NxD + F.dropout(leaving(h_NxF @ own(self.mlp_out), self.mlp_out), drop, self.training)


def layer_norm(x_NxD: Tensor, scale_D: Tensor) -> Tensor:
    """(x − mean) / sqrt(var + 1e-6) · scale."""
    return F.layer_norm(x_NxD, scale_D.shape, scale_D, None, 1e-6)


def features(model: nn.Module, tokens_BxL1: Tensor, loss: Loss = CROSS_ENTROPY) -> LinearHead:
    """The features function of `fsam_core.torch`; tokens are [B, L+1] int64."""
    h_NxD, w_VxD = model(tokens_BxL1[:, :-1])
    return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1), loss=loss)


def staged(blocks: int, loss: Loss = CROSS_ENTROPY) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""

    def prefix(model: Any, tokens_BxL1: Tensor) -> Tensor:
        return model.lower(tokens_BxL1[:, :-1], blocks)

    def suffix(model: Any, x_NxD: Tensor, tokens_BxL1: Tensor) -> LinearHead:
        h_NxD, w_VxD = model.upper(x_NxD, tokens_BxL1.shape[1] - 1, blocks)
        return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1), loss=loss)

    return Staged(prefix, suffix)


def load(model: nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copy values by flat name into the model; the names must be exactly the model's."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in flat.items()})


def as_numpy(model: nn.Module) -> dict[str, np.ndarray]:
    """Flat name -> value."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def _parameter(config: ModelConfig, name: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shapes(config)[name]))
