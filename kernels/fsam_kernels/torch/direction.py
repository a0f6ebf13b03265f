"""The ascent direction of one tensor, shared by the norm and the perturbation; formulas in `fsam_kernels.spec`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Adam(NamedTuple):
    """What the direction takes from AdamW: β₂, its eps, and the 1 − β₂ᵗ of the moment that is used."""

    b2: float
    eps: float
    correction: float | Tensor
    current: bool = True


def direction(g: Tensor, v: Tensor | None, adam: Adam | None, clip: Tensor | float) -> Tensor:
    """d in float32 (float64 for float64 gradients): c g, or c g / (sqrt(v̂) + δ) where `v` is given."""
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    g = g * (clip.to(g.device, g.dtype) if isinstance(clip, Tensor) else clip)
    if v is None or adam is None:
        return g
    moment = (v.to(g.dtype) * adam.b2).addcmul_(g, g, value=1 - adam.b2) if adam.current else v.to(g.dtype)
    return g / (moment / adam.correction).sqrt_().add_(adam.eps)


def with_moments(
    g: Sequence[Tensor], v: Sequence[Tensor] | None, adam: Sequence[Adam] | None
) -> Iterable[tuple[Tensor, Any, Any]]:
    """(gradient, second moment or None, settings or None) of each tensor."""
    none = [None] * len(g)
    return zip(g, none if v is None else v, none if adam is None else adam, strict=True)
