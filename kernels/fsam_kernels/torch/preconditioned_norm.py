"""‖d‖² and gᵀd over a list of gradients, in one pass over (g, v)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch.direction import Adam, Direction, Scratch, as_clip, entries, pieces

SUMMED = 2**15  # equal terms: off by 1.4e-5 of the sum, random ones by 2e-7; of 2^18, by 2.8e-5


class Norms(NamedTuple):
    """Scalar tensors, or with `per_tensor` one value for each tensor, 0 for what the mask leaves out."""

    d_sumsq: Tensor
    g_dot_d: Tensor


class NormsAndGradient(NamedTuple):
    """`Norms`, and Σ (c g)²."""

    d_sumsq: Tensor
    g_dot_d: Tensor
    g_sumsq: Tensor


@torch.no_grad()
def preconditioned_norm(
    g: Sequence[Tensor],
    v: Sequence[Tensor] | None = None,
    *,
    clip: Tensor | float = 1.0,
    adam: Sequence[Adam] | None = None,
    mask: Sequence[bool] | None = None,
    per_tensor: bool = False,
    gradient: bool = False,
) -> Norms | NormsAndGradient:
    """(Σ d², Σ (c g) d[, Σ (c g)²]) in float32, or float64 for float64 gradients, on the first gradient's device.

    Each piece of the tensors gives partial sums, and those are added in one order: the same tensors give the same bits.
    A NaN or an infinity in a gradient shows in the sums. Sums of several calls add up, and so do those of the shards of
    DTensors, of which this rank's is taken.

    The factor c has to be known: d is not linear in it where the current gradient is folded into the moment. Clipping
    therefore takes a pass over g first, or this one with `gradient` and, where the norm then says c < 1, once more;
    without clipping, and with the previous moment or none, where Σ d² and Σ (c g) d scale by c², one pass is enough.

    Args:
        g: gradients, at least one.
        v: AdamW's second moments of the same shapes, or None for d = c g.
        clip: the factor c that gradient clipping would apply to g.
        adam: one for each tensor; needed with `v`.
        mask: False for tensors that are not perturbed; they count for nothing, in Σ (c g)² neither.
        per_tensor: one sum for each tensor.
        gradient: also Σ (c g)², from the same pass.

    Raises:
        ValueError: for lists of different lengths, or tensors of one weight of different shapes.
    """
    if not g:
        raise ValueError("g: at least one gradient is needed, got an empty list")
    scratch, clip = Scratch(), as_clip(clip)
    total = torch.promote_types(g[0].dtype, torch.float32)
    home = g[0].device
    sums: list[list[Tensor]] = [[], [], []]
    factors: list[Tensor | float] = []
    counts = [0] * len(g)
    for entry in entries((g, v if adam is not None else None), adam, mask):
        total = torch.promote_types(total, entry.arrays[0].dtype)
        direction = Direction(entry.adam, clip, scratch)
        for x, moment in pieces(entry.arrays):
            d, cg = direction(x, moment)
            squares = _dots(d, d)
            sums[0] += squares
            sums[1] += squares if d is cg else _dots(d, cg)
            if gradient:
                sums[2] += squares if d is cg else _dots(cg, cg)
            factors += [direction.k] * len(squares)
            counts[entry.place] += len(squares)
    k = _stack(factors, home)
    parts = [_stack(x, home) for x in sums[: 3 if gradient else 2]]
    # Σ d² and Σ (c g) d lack k² and k; in float64, since hundreds of pieces may be added.
    each = [part * factor for part, factor in zip(parts, (k * k, k, torch.ones_like(k)), strict=False)]
    if per_tensor:
        added = [torch.stack([x.sum() for x in part.split(counts)]) for part in each]
    else:
        added = [part.sum() for part in each]
    kind = NormsAndGradient if gradient else Norms
    return kind(*(x.to(total) for x in added))


def _dots(x: Tensor, y: Tensor) -> list[Tensor]:
    """xᵀ y in parts of `SUMMED` elements on a CPU, whose float32 sums lose more digits the longer they are."""
    if x.device.type != "cpu" or len(x) <= SUMMED:
        return [torch.dot(x, y)]
    return [torch.dot(a, b) for a, b in zip(x.split(SUMMED), y.split(SUMMED), strict=True)]


def _stack(values: Sequence[Tensor | float], home: torch.device) -> Tensor:
    """In float64 on one device; numbers are not sent to it one by one."""
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=home)
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor(values, dtype=torch.float64).to(home, non_blocking=True)
    tensors = [x if isinstance(x, Tensor) else torch.tensor(x) for x in values]
    if len({(x.device, x.dtype) for x in tensors}) == 1:
        return torch.stack(tensors).to(home, torch.float64)
    return torch.stack([x.to(home, torch.float64) for x in tensors])
