"""The decoder in PyTorch, with the parameter layout of `layout.shapes`: matrices are [in, out], as in Flax."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fsam_core.torch import LinearHead, Staged
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_trainers.data.batches import rows_of
from fsam_trainers.models.layout import IN_BLOCK, ModelConfig, initial, is_rms, rotation, shapes
from fsam_trainers.torch.mesh import entering, leaving, looked_up, own, own_heads


class Stack(nn.Module, ABC):
    """A model: blocks, and the parameters OWN. Its class says what is below them, in `lower`, and above, in `upper`.

    weights: by flat name; None for initial ones, drawn by `seed`.
    """

    OWN: ClassVar[tuple[str, ...]]

    def __init__(
        self, config: Any, seed: int = 0, *, remat: bool = False, weights: dict[str, np.ndarray] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        for i in range(config.layers):
            self.add_module(f"block_{i}", Block(config, remat=remat))
        for name in self.OWN:
            self.register_parameter(name, _parameter(config, name))
        load(self, initial(config, seed) if weights is None else weights)

    def forward(self, inputs: Tensor) -> Any:
        layers = self.config.layers
        return self.upper(self.lower(inputs, layers), len(inputs), layers)

    @abstractmethod
    def lower(self, inputs: Tensor, blocks: int) -> Tensor:
        """The residual stream x_NxD above the first `blocks` blocks."""

    @abstractmethod
    def upper(self, x_NxD: Tensor, B: int, blocks: int) -> Any:
        """What the model gives, from the result of `lower` for B sequences or images."""

    def _through(self, x_NxD: Tensor, L: int, which: range) -> Tensor:
        for i in which:
            x_NxD = self.get_submodule(f"block_{i}")(x_NxD, L)
        return x_NxD


class Decoder(Stack):
    """Tokens [B, L] -> (last hidden states h_NxD with N = B·L, head weight w_VxD)."""

    OWN = ("embedding", "positions", "final_norm", "final_norm_bias", "head")
    embedding: Tensor
    positions: Tensor | None
    final_norm: Tensor
    final_norm_bias: Tensor | None
    head: Tensor | None

    def lower(self, tokens_BxL: Tensor, blocks: int) -> Tensor:
        B, L = tokens_BxL.shape
        x_NxD = self._embedded(tokens_BxL.reshape(-1))
        if self.positions is not None:
            x_NxD = x_NxD + self.positions[:L].repeat(B, 1)
        x_NxD = F.dropout(x_NxD, self.config.dropout, self.training)
        return self._through(x_NxD, L, range(blocks))

    def upper(self, x_NxD: Tensor, B: int, blocks: int) -> tuple[Tensor, Tensor]:
        x_NxD = self._through(x_NxD, len(x_NxD) // B, range(blocks, self.config.layers))
        h_NxD = normed(self, "final_norm", x_NxD)
        return h_NxD, self.embedding if self.head is None else self.head

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


Model = Decoder


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream; `ModelConfig` names the variants.

    With `remat` its input alone is kept for the backward pass, which computes the rest again.
    """

    attention_norm: Tensor
    qkv: Tensor | None
    qkv_bias: Tensor | None
    q: Tensor
    kv: Tensor
    kv_bias: Tensor | None
    q_norm: Tensor
    k_norm: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    mlp_gate: Tensor | None
    mlp_in: Tensor
    mlp_out: Tensor

    def __init__(self, config: ModelConfig, *, remat: bool = False) -> None:
        super().__init__()
        self.config, self.remat = config, remat
        for name in (x for part in IN_BLOCK for x in (part, f"{part}_bias")):
            self.register_parameter(name, _parameter(config, f"block_0.{name}"))

    def forward(self, x_NxD: Tensor, L: int) -> Tensor:
        # Not an argument: FSDP2 casts those to the dtype of the weights.
        turn = turn_of(self.config, L, x_NxD.device)
        # The checkpoint is inside the block: parameter names stay, and wrappers' hooks run outside it.
        if self.remat and torch.is_grad_enabled():
            return checkpoint(self._forward, x_NxD, L, turn, use_reentrant=False)
        return self._forward(x_NxD, L, turn)

    def compile(self, **options: Any) -> None:
        """As `Module.compile`, but inside the checkpoint: a graph that contains checkpoints takes no DTensors."""
        self._forward = torch.compile(self._forward, **options)  # type: ignore[method-assign]

    def _forward(self, x_NxD: Tensor, L: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        drop = self.config.dropout
        a_NxA = self._attention(entering(normed(self, "attention_norm", x_NxD), self.attention_out), L, turn)
        x_NxD = x_NxD + F.dropout(self._leaving("attention_out", a_NxA), drop, self.training)
        h_NxD = entering(normed(self, "mlp_norm", x_NxD), self.mlp_in)
        h_NxF = self._through("mlp_in", h_NxD)
        if self.mlp_gate is None:
            h_NxF = F.gelu(h_NxF, approximate="tanh")
        else:
            h_NxF = F.silu(self._through("mlp_gate", h_NxD)) * h_NxF
        return x_NxD + F.dropout(self._leaving("mlp_out", h_NxF), drop, self.training)

    def _attention(self, h_NxD: Tensor, L: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """[N, D] -> [N, A], of this tensor rank's heads."""
        c, N = self.config, len(h_NxD)
        B = N // L
        if self.qkv is not None:
            qkv_NxE = plus(h_NxD @ own_heads(self.qkv, 3), self.qkv_bias)
            q, k, v = qkv_NxE.view(B, L, 3, -1, c.d).permute(2, 0, 3, 1, 4)
        else:
            q = self._through("q", h_NxD).view(B, L, -1, c.d).transpose(1, 2)
            kv_NxE = plus(h_NxD @ own_heads(self.kv, 2), self.kv_bias)
            k, v = kv_NxE.view(B, L, 2, -1, c.d).permute(2, 0, 3, 1, 4)
        if c.qk_norm:
            # Every tensor rank has some of the heads, and their scales' whole gradient is the sum.
            q_scale_d, k_scale_d = (entering(x, self.attention_out) for x in (self.q_norm, self.k_norm))
            q, k = norm(c, "q_norm", q, q_scale_d), norm(c, "k_norm", k, k_scale_d)
        if turn is not None:
            q, k = rotated(q, *turn), rotated(k, *turn)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=c.CAUSAL, enable_gqa=c.heads != c.K)
        return a.transpose(1, 2).reshape(N, -1)

    def _through(self, name: str, x_NxI: Tensor) -> Tensor:
        return plus(x_NxI @ own(getattr(self, name)), getattr(self, f"{name}_bias"))

    def _leaving(self, name: str, x_NxI: Tensor) -> Tensor:
        w: Tensor = getattr(self, name)
        return plus(leaving(x_NxI @ own(w), w), getattr(self, f"{name}_bias"))


@lru_cache(maxsize=8)
def _turn(d: int, theta: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept ones are used by later passes with gradients
        cos_LxE, sin_LxE = (torch.from_numpy(x).to(device) for x in rotation(d, theta, length))
    return cos_LxE, sin_LxE


def turn_of(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of a model with rotary positions, [length, d / 2] each in float32."""
    return _turn(config.d, config.rope_theta, length, device) if config.rotary else None


def rotated(x_xLxd: Tensor, cos_LxE: Tensor, sin_LxE: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) of the last axis turned by the angles of their positions, in float32 or wider."""
    a_xLxE, b_xLxE = x_xLxd.chunk(2, -1)
    turned = a_xLxE * cos_LxE - b_xLxE * sin_LxE, b_xLxE * cos_LxE + a_xLxE * sin_LxE
    return torch.cat(turned, -1).to(x_xLxd.dtype)


def norm(c: ModelConfig, name: str, x_xD: Tensor, scale_D: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """The norm of this name over the last axis: x / sqrt(mean x² + eps) · scale, or a layer norm."""
    if is_rms(c, name):
        return F.rms_norm(x_xD, scale_D.shape, scale_D, c.norm_eps)
    return F.layer_norm(x_xD, scale_D.shape, scale_D, bias_D, c.norm_eps)


def normed(module: Any, name: str, x_xD: Tensor) -> Tensor:
    """The norm of this name in a module."""
    return norm(module.config, name, x_xD, getattr(module, name), getattr(module, f"{name}_bias", None))


def plus(x_NxE: Tensor, bias_E: Tensor | None) -> Tensor:
    """x + bias, where there is one."""
    return x_NxE if bias_E is None else x_NxE + bias_E


def features(model: nn.Module, tokens_BxL1: Tensor, loss: Loss = CROSS_ENTROPY) -> LinearHead:
    """The features function of `fsam_core.torch`; tokens are [B, L+1] int64.

    A negative token is context: the input ~token, and no target.
    """
    return _head(model(_inputs(tokens_BxL1)), tokens_BxL1, loss)


def staged(blocks: int, loss: Loss = CROSS_ENTROPY) -> Staged:
    """`features` in two stages; the lower one holds the first `blocks` blocks."""
    return in_stages(blocks, _inputs, partial(_head, loss=loss))


def in_stages(blocks: int, inputs: Callable[[Any], Tensor], head: Callable[[Any, Any], LinearHead]) -> Staged:
    """head(model(inputs(batch)), batch) of a `Stack` in two stages; the lower one holds the first `blocks` blocks."""

    def prefix(model: Any, batch: Any) -> Tensor:
        return model.lower(inputs(batch), blocks)

    def suffix(model: Any, x_NxD: Tensor, batch: Any) -> LinearHead:
        return head(model.upper(x_NxD, rows_of(batch), blocks), batch)

    return Staged(prefix, suffix)


def _inputs(tokens_BxL1: Tensor) -> Tensor:
    tokens_BxL = tokens_BxL1[:, :-1]
    return torch.where(tokens_BxL < 0, ~tokens_BxL, tokens_BxL)


def _head(out: tuple[Tensor, Tensor], tokens_BxL1: Tensor, loss: Loss) -> LinearHead:
    h_NxD, w_VxD = out
    return LinearHead(h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1), loss=loss)


def load(model: nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copy values by flat name into the model; the names must be exactly the model's."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in flat.items()})


def as_numpy(model: nn.Module) -> dict[str, np.ndarray]:
    """Flat name -> value."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def _parameter(config: ModelConfig, name: str) -> nn.Parameter | None:
    """Room for the parameter of this name; None where the model has none."""
    shape = shapes(config).get(name)
    return None if shape is None else nn.Parameter(torch.empty(shape))
