"""‖d‖² and gᵀd over a list of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsam_kernels.torch.direction import Adam, direction, with_moments


@torch.no_grad()
def preconditioned_norm(
    g: Sequence[Tensor],
    v: Sequence[Tensor] | None = None,
    *,
    clip: Tensor | float = 1.0,
    adam: Sequence[Adam] | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ d², Σ (c g) d), two scalar tensors on the first gradient's device; sums of several calls add up.

    Args:
        g: gradients, at least one.
        v: AdamW's second moments of the same shapes, or None for d = c g.
        clip: the factor c that gradient clipping would apply to g.
        adam: one for each tensor; needed with `v`.
    """
    sumsq, dot = [], []
    for x, moment, settings in with_moments(g, v, adam):
        d = direction(x, moment, settings, clip)
        sumsq.append(d.square().sum())
        dot.append((d * x).sum())
    first = sumsq[0]
    total = [torch.stack([x.to(first.device) for x in sums]).sum() for sums in (sumsq, dot)]
    return total[0], total[1] * (clip.to(first) if isinstance(clip, Tensor) else clip)
