"""Functional-SAM in a few lines of autograd, written for any PyTorch model: ĝ = ∇ ⟨F(θ+ε), stop_gradient(∂L/∂z(θ))⟩."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = Callable[[nn.Module, Any], Sequence[Tensor]]


def functional(
    model: nn.Module, batches: Sequence[Any], outputs: Outputs, loss: Callable[..., Tensor], rho: float
) -> dict[str, Tensor]:
    """ĝ by name along ε = ρ g / ‖g‖₂.

    Args:
        outputs: (model, batch) -> z, the tensors that the loss depends on.
        loss: one list of z a batch -> the loss of them all.
    """
    model = copy.deepcopy(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    z = [list(outputs(model, batch)) for batch in batches]
    held = [[x.detach().requires_grad_() for x in one] for one in z]
    zbar = torch.autograd.grad(loss(*held), [x for one in held for x in one])
    flat = lambda every: [x for one in every for x in one]
    g = torch.autograd.grad(flat(z), list(params.values()), zbar, allow_unused=True, materialize_grads=True)
    norm = torch.cat([x.flatten() for x in g]).norm()
    with torch.no_grad():
        for p, x in zip(params.values(), g, strict=True):
            p.add_(rho * x / norm)
    moved = flat([list(outputs(model, batch)) for batch in batches])
    found = torch.autograd.grad(moved, list(params.values()), zbar, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=True))


def off_by(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """‖.grad − expected‖ / ‖expected‖ over all parameters."""
    grads = {name: p.grad for name, p in model.named_parameters() if name in expected}
    dense = {k: torch.zeros_like(expected[k]) if g is None else g.to_dense() for k, g in grads.items()}
    error = torch.cat([(dense[k] - x).flatten() for k, x in expected.items()]).norm()
    return float(error / torch.cat([x.flatten() for x in expected.values()]).norm())
