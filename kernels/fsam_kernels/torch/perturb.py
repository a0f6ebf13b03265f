"""The perturbed weights of a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsam_kernels.torch.direction import Adam, direction, with_moments


@torch.no_grad()
def perturb(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor] | None,
    scale: Tensor,
    *,
    clip: Tensor | float = 1.0,
    adam: Sequence[Adam] | None = None,
) -> list[Tensor]:
    """θ + scale · d as new tensors; added in float32 and rounded once, to the dtype of each weight.

    Args:
        theta: weights, left as they are.
        g, v, clip, adam: as in `preconditioned_norm`.
        scale: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d), a scalar tensor on the same device: nothing here waits for it.
    """
    directions = (direction(*one, clip) for one in with_moments(g, v, adam))
    return [
        torch.addcmul(weight.to(d.dtype), d, scale.to(d.device, d.dtype)).to(weight.dtype)
        for weight, d in zip(theta, directions, strict=True)
    ]
