"""SAM and Functional-SAM as written without this package, in PyTorch: full logits, two backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.regions import in_torch as region

KINDS = ("adamw", "sam", "functional-sam")
Logits = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def step(
    kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, logits: Logits, rho: float, clip_norm: float
) -> Callable[[Any], Tensor]:
    """batch -> mean loss at θ, after one step; the direction of ascent is g / ‖g‖ without a preconditioner.

    Args:
        kind: "adamw", "sam" for J(θ+ε)ᵀ z̄(θ+ε), "functional-sam" for J(θ+ε)ᵀ z̄(θ).
        logits: (model, batch) -> (logits_NxV, labels_N).
        rho: length of the perturbation.
        clip_norm: global norm that the final gradient is clipped to; 0 for none.

    Raises:
        UserError: for another kind.
    """
    if kind not in KINDS:
        raise UserError(f"textbook: {kind!r} is not known; use {', '.join(KINDS)}")

    def one(batch: Any) -> Tensor:
        optimizer.zero_grad()
        with region("base forward"):
            z_NxV, labels_N = logits(model, batch)
        with region("base backward"):
            loss = F.cross_entropy(z_NxV, labels_N)
            if kind == "functional-sam":
                (zbar_NxV,) = torch.autograd.grad(loss, z_NxV, retain_graph=True)
            loss.backward()
        if kind != "adamw":
            before = _climb(model, rho)
            optimizer.zero_grad()
            with region("second forward"):
                z_NxV, labels_N = logits(model, batch)
            with region("second backward"):
                if kind == "sam":
                    F.cross_entropy(z_NxV, labels_N).backward()
                else:
                    z_NxV.backward(zbar_NxV)
            with torch.no_grad(), region("update"):
                for p, old in before:
                    p.copy_(old)
        with region("update"):
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
        return loss.detach()

    return one


@torch.no_grad()
def _climb(model: nn.Module, rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Add ρ g / ‖g‖ to every weight; returns the weights, each with a copy of its value before."""
    moved = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    with region("norm"):
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for _, g in moved]))
    with region("perturb"):
        before = [(p, p.clone()) for p, _ in moved]
        for p, g in moved:
            p.add_(g * (rho / (norm + 1e-12)))
    return before
