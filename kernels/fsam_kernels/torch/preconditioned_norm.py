"""‖d‖² and gᵀd over a list of gradients, in one pass over (g, v)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch.direction import Adam, Direction, Entry, Scratch, as_clip, entries, pieces

SUMMED = 2**16  # equal terms: off by at most 2.6e-5 of the sum; of 2^15, by 1.4e-5, and of 2^18, by 9e-5


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
    adam = adam if v is not None else None
    total = torch.promote_types(g[0].dtype, torch.float32)
    home = g[0].device
    sums: tuple[list[Tensor | float], ...] = ([], [], [])
    factors: tuple[list[Tensor | float], ...] = ([], [])
    counts = [0] * len(g)
    for entry in entries((g, v if adam is not None else None), adam, mask):
        total = torch.promote_types(total, entry.arrays[0].dtype)
        direction = Direction(entry.adam, clip, scratch, entry.arrays[0].device)
        for x, moment in _parts(entry):
            d, cg = direction(x, moment)
            sums[0].append(_square(d))
            sums[1].append(sums[0][-1] if d is cg else _dot(d, cg))
            if gradient:
                sums[2].append(sums[0][-1] if d is cg else _square(cg))
            factors[0].append(direction.k)
            factors[1].append(direction.c)
            counts[entry.place] += 1
    k, c = (_stack(x, home) for x in factors)
    parts = [_stack(x, home) for x in sums[: 3 if gradient else 2]]
    # What the sums lack; in float64, since hundreds of pieces may be added.
    each = [part * factor for part, factor in zip(parts, (k * k, k * c, c * c), strict=False)]
    kind = NormsAndGradient if gradient else Norms
    return kind(*(_added(part, counts, per_tensor).to(total) for part in each))


@torch.no_grad()
def direction_and_norm(
    g: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    clip: Tensor | float = 1.0,
    adam: Sequence[Adam],
    out: Sequence[Tensor],
    per_tensor: bool = False,
) -> Tensor:
    """d to `out`, and Σ d² as `preconditioned_norm` gives it; θ + scale · d is then `perturb(θ, out, None, scale)`.

    For a CPU, where the direction costs more to compute than to store: 8 bytes a weight more here, 4 fewer there, and
    the root taken once. Where bandwidth is the limit the two operations that each compute it move less.

    Args:
        g, v, clip, adam, per_tensor: as in `preconditioned_norm`.
        out: where d is written, of the dtype that it is computed in.

    Raises:
        ValueError: as `preconditioned_norm`.
    """
    if not g:
        raise ValueError("g: at least one gradient is needed, got an empty list")
    scratch, clip = Scratch(), as_clip(clip)
    sums: list[Tensor | float] = []
    counts = [0] * len(g)
    for entry in entries((g, v, out), adam, written=1):
        direction = Direction(entry.adam, clip, scratch, entry.arrays[0].device)
        for x, moment, d in pieces(entry.arrays):
            direction.into(d, x, moment)
            sums.append(_square(d))
            counts[entry.place] += 1
    return _added(_stack(sums, g[0].device), counts, per_tensor).to(out[0].dtype)


def _added(parts: Tensor, counts: list[int], per_tensor: bool) -> Tensor:
    """The pieces' sums, of each tensor or of all."""
    return torch.stack([x.sum() for x in parts.split(counts)]) if per_tensor else parts.sum()


def _parts(entry: Entry) -> Iterator[tuple[Any, ...]]:
    """Its pieces; on a CPU all of it where nothing is made of it but the sum of its squares."""
    x, _ = entry.arrays
    if entry.adam is None and x.device.type == "cpu" and x.dtype == torch.promote_types(x.dtype, torch.float32):
        return iter([entry.arrays] if x.numel() else [])
    return pieces(entry.arrays)


def _dot(x: Tensor, y: Tensor) -> Tensor | float:
    """xᵀ y; on a CPU a number, of parts of `SUMMED` elements: its float32 sums lose more digits the longer they are."""
    if x.device.type != "cpu":
        return torch.dot(x, y)
    return sum(float(torch.dot(a, b)) for a, b in zip(x.split(SUMMED), y.split(SUMMED), strict=True))


def _square(x: Tensor) -> Tensor | float:
    """xᵀ x likewise, the parts of a long piece in one call, which takes two thirds of the time."""
    rows = len(x) // SUMMED
    if x.device.type != "cpu" or rows < 2:
        return _dot(x, x)
    norms = torch.linalg.vector_norm(x[: rows * SUMMED].view(rows, SUMMED), dim=1)
    rest = x[rows * SUMMED :]
    return float(norms.double().square().sum()) + (_dot(rest, rest) if len(rest) else 0.0)


def _stack(values: Sequence[Tensor | float], home: torch.device) -> Tensor:
    """In float64 on one device; numbers are not sent to it one by one."""
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor(values, dtype=torch.float64).to(home, non_blocking=True)
    tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in values]
    if len({(x.device, x.dtype) for x in tensors}) == 1:
        return torch.stack(tensors).to(home, torch.float64)
    return torch.stack([x.to(home, torch.float64) for x in tensors])
