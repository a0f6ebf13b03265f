"""Tiny models and batches for docs/integrations.md, and a step's gradient by hand-written autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

V, L, RHO, CLIP = 97, 12, 0.1, 0.5
Gradients = dict[str, Tensor]


def llama(**options: Any) -> nn.Module:
    """Two layers of width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **sizes, **options))


def token_batches(count: int = 2, rows: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Micro-batches for a causal model, each with other numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (count, rows, L), generator=generator)
    labels = ids.clone()
    for i in range(count):
        labels[i, 0, : 2 + 3 * (i % 3)] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All micro-batches as one."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of labels that are those of the inputs, as transformers has it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def reference(
    model: nn.Module, outputs: Callable[[nn.Module], tuple[Tensor, ...]], loss: Callable[..., Tensor], rho: float = RHO
) -> Gradients:
    """∇ ⟨F(θ+ε), stop_gradient(∂L/∂z(θ))⟩ by name in float64, ε = ρ g / ‖g‖, for parameters that require a gradient.

    Args:
        outputs: model -> z, the tensors that `loss` takes.
        loss: z -> mean loss.
    """
    model = copy.deepcopy(model).double()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    z = outputs(model)
    held = [x.detach().requires_grad_() for x in z]  # leaves, for one output may be computed from another
    zbar = torch.autograd.grad(loss(*held), held)
    g = torch.autograd.grad(z, list(params.values()), zbar, allow_unused=True)
    found = [torch.zeros_like(p) if x is None else x for p, x in zip(params.values(), g, strict=True)]
    length = torch.stack([x.norm() for x in found]).norm()
    with torch.no_grad():
        for p, x in zip(params.values(), found, strict=True):
            p.add_(x, alpha=rho / float(length))
    g = torch.autograd.grad(outputs(model), list(params.values()), zbar, allow_unused=True)
    every = zip(params.items(), g, strict=True)
    return {name: torch.zeros_like(p) if x is None else x for (name, p), x in every}


def clipped(gradients: Gradients, norm: float = CLIP) -> Gradients:
    """Scaled down to that global norm."""
    length = float(torch.stack([x.norm() for x in gradients.values()]).norm())
    return {name: x * min(1.0, norm / length) for name, x in gradients.items()}


def error(found: Mapping[str, Tensor], expected: Gradients) -> float:
    """‖difference‖ / ‖expected‖ over all parameters."""
    difference = torch.stack([(found[name].double() - x).norm() for name, x in expected.items()]).norm()
    return float(difference / torch.stack([x.norm() for x in expected.values()]).norm())


def weights(model: nn.Module) -> Gradients:
    """The parameters that require a gradient, copied in float64."""
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(before: Gradients, model: nn.Module) -> Gradients:
    """What SGD with a learning rate of 1 has subtracted: the gradient that it was given."""
    after = weights(model)
    return {name: x - after[name] for name, x in before.items()}


class Nano(nn.Module):
    """The outline of a nanoGPT model: a tied head, and a loss if there are targets."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, 32), nn.Embedding(L, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.ln_f = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=self.wpe.weight.dtype)
        x = self.ln_f(self.block(self.wte(idx) + self.wpe(torch.arange(T)), mask))
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
