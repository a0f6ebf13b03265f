"""The ascent direction of one tensor, shared by the norm and the perturbation; formulas in `fsam_kernels.spec`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Adam(NamedTuple):
    """What the direction takes from AdamW: β₂, its eps, and the 1 − β₂ᵗ of the moment that is used."""

    b2: float
    eps: float
    correction: float
    current: bool = True


def direction(g: Tensor, v: Tensor | None, clip: Tensor | float, adam: Adam | None) -> Tensor:
    """d in float32 (float64 for float64 gradients): c g, or c g / (sqrt(v̂) + δ) where `v` is given."""
    g = g.to(torch.promote_types(g.dtype, torch.float32)) * clip
    if v is None or adam is None:
        return g
    moment = (v.to(g.dtype) * adam.b2).addcmul_(g, g, value=1 - adam.b2) if adam.current else v.to(g.dtype)
    return g / (moment / adam.correction).sqrt_().add_(adam.eps)
