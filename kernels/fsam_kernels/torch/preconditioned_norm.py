"""‖d‖² and gᵀd over a list of gradients, in one pass over (g, v)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch import multi_tensor
from fsam_kernels.torch.direction import SMALL, Adam, Direction, accum_dtype, as_clip, directions

# Elements of one float32 sum. With equal terms its relative error is at most 2.6e-5; at 2^15 1.4e-5, at 2^18 9e-5.
SUMMED = 2**16


class Norms(NamedTuple):
    """Scalar tensors, or with `per_tensor` one value for each tensor, 0 for a masked one."""

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

    Each piece of a tensor gives partial sums, which are added in a fixed order: the same tensors give the same bits. A
    NaN or an infinity in a gradient shows in the sums. The sums of several calls, or of the shards of DTensors, add up;
    for a DTensor this rank's shard is used.

    The factor c has to be known first, because d is not linear in c where the current gradient is folded into the
    moment. Clipping therefore needs a pass over g before this one, or this pass with `gradient` and a repetition where
    the norm gives c < 1. One pass is enough without clipping, and also with the previous moment or none, where Σ d² and
    Σ (c g) d scale by c².

    Args:
        g: gradients, at least one.
        v: AdamW's second moments of the same shapes, or None for d = c g.
        clip: the factor c that gradient clipping would apply to g.
        adam: one for each tensor; required with `v`.
        mask: False for tensors that are not perturbed; they count 0 in every sum, Σ (c g)² included.
        per_tensor: one sum for each tensor.
        gradient: also Σ (c g)², from the same pass.

    Raises:
        ValueError: for lists of different lengths, or different shapes of one weight's tensors.
    """
    if not g:
        raise ValueError("g: at least one gradient is needed, got an empty list")
    adam = adam if v is not None else None
    if any(x.device.type != "cpu" for x in g):
        return _of_lists(g, v if adam is not None else None, as_clip(clip), adam, mask, per_tensor, gradient)
    total = accum_dtype(g[0].dtype)
    home = g[0].device
    sums: tuple[list[float], ...] = ([], [], [])
    factors: tuple[list[Tensor | float], ...] = ([], [])
    counts = [0] * len(g)
    for entry, direction, parts in directions((g, v if adam is not None else None), adam, clip, mask):
        total = torch.promote_types(total, entry.arrays[0].dtype)
        for part in parts:
            d, cg = direction(*part.arrays)
            sums[0].append(_sum_of_squares(d))
            sums[1].append(sums[0][-1] if d is cg else _dot(d, cg))
            if gradient:
                sums[2].append(sums[0][-1] if d is cg else _sum_of_squares(cg))
            factors[0].append(direction.k)
            factors[1].append(direction.c)
            counts[entry.place] += 1
    k, c = (_stack(x, home) for x in factors)
    stacked = [_stack(x, home) for x in sums[: 3 if gradient else 2]]
    # The pieces lack the factors k and c. The sums are float64, since there may be hundreds of pieces.
    each = [x * factor for x, factor in zip(stacked, (k * k, k * c, c * c), strict=False)]
    kind = NormsAndGradient if gradient else Norms
    return kind(*(_added(x, counts, per_tensor).to(total) for x in each))


def _of_lists(
    g: Sequence[Tensor],
    v: Sequence[Tensor] | None,
    clip: Tensor | float,
    adam: Sequence[Adam] | None,
    mask: Sequence[bool] | None,
    per_tensor: bool,
    gradient: bool,
) -> Norms | NormsAndGradient:
    """The same by operations on lists of tensors, for devices other than a CPU."""
    home, total = g[0].device, accum_dtype(g[0].dtype)
    each: list[list[Tensor]] = [[], [], []]
    places: list[int] = []
    for batch in multi_tensor.batches((g, v), adam, mask):
        gradients, moments = batch.arrays
        found = multi_tensor.directions(gradients, moments, batch.adam, clip)
        k, c = (x.double() if isinstance(x, Tensor) else x for x in (found.k, found.c))
        total = torch.promote_types(total, found.d[0].dtype)
        for sums, x, factor in zip(each, multi_tensor.sums(found, gradient), (k * k, k * c, c * c), strict=False):
            sums.append((x * factor).to(home))
        places += batch.places
    kind = NormsAndGradient if gradient else Norms
    whole = [torch.cat(x) if x else torch.zeros(0, dtype=torch.float64, device=home) for x in each[: len(kind._fields)]]
    if not per_tensor:
        return kind(*(x.sum().to(total) for x in whole))
    at = torch.tensor(places, dtype=torch.int64).to(home, non_blocking=True)
    zeros = torch.zeros(len(g), dtype=torch.float64, device=home)
    return kind(*(zeros.index_add(0, at, x).to(total) for x in whole))


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
    """Write d to `out` and return Σ d², as `preconditioned_norm` does; θ + scale · d is `perturb(θ, out, None, scale)`.

    It is for a CPU, where d costs more to compute than to store: it moves 8 bytes a weight more here and 4 fewer in
    `perturb`, and takes the square root once. Where bandwidth is the limit, computing d in both operations moves less.

    Args:
        g, v, clip, adam, per_tensor: as in `preconditioned_norm`.
        out: tensors for d, in the dtype in which it is computed.

    Raises:
        ValueError: as `preconditioned_norm`.
    """
    if not g:
        raise ValueError("g: at least one gradient is needed, got an empty list")
    sums: list[float] = []
    counts = [0] * len(g)
    small: dict[Adam | None, list[tuple[int, Direction, tuple[Any, ...]]]] = {}
    for entry, direction, parts in directions((g, v, out), adam, clip, written=1):
        counts[entry.place] = len(parts)
        is_small = direction.by_adagrad and len(parts) == 1 and parts[0].arrays[0].numel() <= SMALL
        if is_small and all(x.dtype == torch.float32 for x in parts[0].arrays):
            small.setdefault(entry.adam, []).append((len(sums), direction, parts[0].arrays))
            sums.append(0.0)
            continue
        for _, (x, moment, d) in parts:
            direction.into(d, x, moment)
            sums.append(_sum_of_squares(d))
    for some in small.values():
        x, moment, d = zip(*(arrays for *_, arrays in some), strict=True)
        some[0][1].into_lists(d, x, moment)
        squares = torch.stack(torch._foreach_norm(list(d))).double().square().tolist()
        for (at, *_), square in zip(some, squares, strict=True):
            sums[at] = square
    return _added(_stack(sums, g[0].device), counts, per_tensor).to(out[0].dtype)


@torch.no_grad()
def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ over all tensors, each summed in float32 or wider; without v, clip and mask, and in few calls."""
    norms: list[Tensor] = [] if tensors else [torch.zeros(())]
    for kind in dict.fromkeys(accum_dtype(x.dtype) for x in tensors):
        short: list[Tensor] = []
        for x in (x for x in tensors if accum_dtype(x.dtype) == kind):
            if x.device.type == "cpu" and x.numel() > SUMMED:
                norms.append(torch.tensor(math.sqrt(_sum_of_squares(x.reshape(-1))), dtype=kind))
            else:
                short.append(x)
        norms += torch._foreach_norm(short, 2, dtype=kind) if short else []
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))


def _added(parts: Tensor, counts: list[int], per_tensor: bool) -> Tensor:
    """The sums of the pieces, per tensor or over all tensors."""
    return torch.stack([x.sum() for x in parts.split(counts)]) if per_tensor else parts.sum()


def _dot(x: Tensor, y: Tensor) -> float:
    """xᵀ y, summed over parts of `SUMMED` elements, because longer float32 sums lose digits."""
    return sum(float(torch.dot(a, b)) for a, b in zip(x.split(SUMMED), y.split(SUMMED), strict=True))


def _sum_of_squares(x: Tensor) -> float:
    """xᵀ x of a 1-d tensor on the CPU likewise; the threads share the parts, whose sums are the same for any number.

    Over 18.9 million float32 elements Σ x² by PyTorch's norm is 1.8e-3 off where they are random, 1.9e-2 where they are
    equal, and takes 3.5 times as long, because one thread does it.
    """
    whole = len(x) // SUMMED * SUMMED
    parts = [rows for rows in (x[:whole].view(whole // SUMMED, SUMMED), x[whole:].view(1, -1)) if rows.numel()]
    kind = accum_dtype(x.dtype)
    return sum(float(torch.linalg.vector_norm(rows, dim=1, dtype=kind).double().square().sum()) for rows in parts)


def _stack(values: Sequence[Tensor | float], home: torch.device) -> Tensor:
    """The values in float64 on one device; numbers are sent together, not one by one."""
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor(values, dtype=torch.float64).to(home, non_blocking=True)
    tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in values]
    if len({(x.device, x.dtype) for x in tensors}) == 1:
        return torch.stack(tensors).to(home, torch.float64)
    return torch.stack([x.to(home, torch.float64) for x in tensors])
