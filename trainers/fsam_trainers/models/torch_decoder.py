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
    """Tokens [B, L] -> (last hidden states h_NxD with N = B·L, head weight w_VxD).

    weights: by flat name; None for initial ones, drawn by `seed`.
    """

    def __init__(
        self, config: ModelConfig, seed: int = 0, *, remat: bool = False, weights: dict[str, np.ndarray] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        for i in range(config.layers):
            self.add_module(f"block_{i}", Block(config, remat=remat))
        self.embedding = _parameter(config, "embedding")
        self.positions = _parameter(config, "positions")
        self.final_norm = _parameter(config, "final_norm")
        self.final_norm_bias = _bias(config, "final_norm")
        if not config.tied:
            self.head = _parameter(config, "head")
        load(self, initial(config, seed) if weights is None else weights)

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
        h_NxD = layer_norm(x_NxD, self.final_norm, self.final_norm_bias, self.config.norm_eps)
        return h_NxD, self.embedding if self.config.tied else self.head

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

    attention_norm: Tensor
    qkv: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    attention_norm_bias: Tensor | None
    qkv_bias: Tensor | None
    attention_out_bias: Tensor | None
    mlp_norm_bias: Tensor | None
    mlp_in_bias: Tensor | None
    mlp_out_bias: Tensor | None

    def __init__(self, config: ModelConfig, *, remat: bool = False) -> None:
        super().__init__()
        self.config, self.remat = config, remat
        for name in ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out"):
            self.register_parameter(name, _parameter(config, f"block_0.{name}"))
            self.register_parameter(f"{name}_bias", _bias(config, f"block_0.{name}"))

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
        B, d, drop, eps = N // L, D // self.config.heads, self.config.dropout, self.config.norm_eps
        h_NxD = entering(layer_norm(x_NxD, self.attention_norm, self.attention_norm_bias, eps), self.qkv)
        qkv_Nx3D = plus(h_NxD @ own_heads(self.qkv), self.qkv_bias)
        q, k, v = qkv_Nx3D.view(B, L, 3, -1, d).permute(2, 0, 3, 1, 4)
        a_NxD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(N, -1)
        a_NxD = plus(leaving(a_NxD @ own(self.attention_out), self.attention_out), self.attention_out_bias)
        x_NxD = x_NxD + F.dropout(a_NxD, drop, self.training)
        h_NxD = entering(layer_norm(x_NxD, self.mlp_norm, self.mlp_norm_bias, eps), self.mlp_in)
        h_NxF = F.gelu(plus(h_NxD @ own(self.mlp_in), self.mlp_in_bias), approximate="tanh")
        h_NxD = plus(leaving(h_NxF @ own(self.mlp_out), self.mlp_out), self.mlp_out_bias)
        return x_NxD + F.dropout(h_NxD, drop, self.training)


def layer_norm(x_NxD: Tensor, scale_D: Tensor, bias_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x − mean) / sqrt(var + eps) · scale + bias."""
    return F.layer_norm(x_NxD, scale_D.shape, scale_D, bias_D, eps)


def plus(x_NxE: Tensor, bias_E: Tensor | None) -> Tensor:
    """x + bias, where there is one."""
    return x_NxE if bias_E is None else x_NxE + bias_E


def features(model: nn.Module, tokens_BxL1: Tensor, loss: Loss = CROSS_ENTROPY) -> LinearHead:
    """The features function of `fsam_core.torch`; tokens are [B, L+1] int64.

    A negative token is context: the input ~token, and no target.
    """
    h_NxD, w_VxD = model(_inputs(tokens_BxL1))
    return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1), loss=loss)


def staged(blocks: int, loss: Loss = CROSS_ENTROPY) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""

    def prefix(model: Any, tokens_BxL1: Tensor) -> Tensor:
        return model.lower(_inputs(tokens_BxL1), blocks)

    def suffix(model: Any, x_NxD: Tensor, tokens_BxL1: Tensor) -> LinearHead:
        h_NxD, w_VxD = model.upper(x_NxD, tokens_BxL1.shape[1] - 1, blocks)
        return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1), loss=loss)

    return Staged(prefix, suffix)


def _inputs(tokens_BxL1: Tensor) -> Tensor:
    tokens_BxL = tokens_BxL1[:, :-1]
    return torch.where(tokens_BxL < 0, ~tokens_BxL, tokens_BxL)


def load(model: nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copy values by flat name into the model; the names must be exactly the model's."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in flat.items()})


def as_numpy(model: nn.Module) -> dict[str, np.ndarray]:
    """Flat name -> value."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def _parameter(config: ModelConfig, name: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shapes(config)[name]))


def _bias(config: ModelConfig, name: str) -> nn.Parameter | None:
    return _parameter(config, f"{name}_bias") if config.biases else None
