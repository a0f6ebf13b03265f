"""‖d‖² and gᵀd over many tensors in two launches: the sums of each chunk, and their sum in a fixed order.

It reads 8 bytes an element of float32 gradients and moments; see `fsam_kernels.triton.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsam_kernels.torch.direction import Adam
from fsam_kernels.torch.preconditioned_norm import Norms, NormsAndGradient
from fsam_kernels.torch.rounding import NEAREST
from fsam_kernels.triton import tables

SUM_BLOCK, SUM_WARPS = 4096, 8


@triton.jit(do_not_specialize=["first", "stride"])
def norm_chunk(
    table_ptr, chunks_ptr, clip_ptr, partials_ptr, first, stride,
    G: tl.constexpr, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ d², Σ (c g) d[, Σ (c g)²] of one chunk; V is None for the plain direction."""
    row, start, left, aligned = tables.find(table_ptr, chunks_ptr, first, BLOCK)
    partials_ptr += first + tl.program_id(0)
    if (left >= BLOCK) & (aligned != 0):
        _norm(row, start, left, clip_ptr, partials_ptr, stride, G, V, GRADIENT, BLOCK, FULL=True)
    else:
        _norm(row, start, left, clip_ptr, partials_ptr, stride, G, V, GRADIENT, BLOCK, FULL=False)


@triton.jit
def _norm(
    row, start, left, clip_ptr, partials_ptr, stride,
    G: tl.constexpr, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    cg = tables.scaled(tables.load(row, 0, start, left, G, BLOCK, FULL), clip_ptr)
    if V is None:
        d = cg
    else:
        d = tables.direction(cg, tables.load(row, 1, start, left, V, BLOCK, FULL), row)
        if not FULL:  # beyond the end the direction is 0 / 0 where eps is 0
            d = tl.where(tl.arange(0, BLOCK) < left, d, 0.0)
    tl.store(partials_ptr, tl.sum(d * d, 0))
    tl.store(partials_ptr + stride, tl.sum(cg * d, 0))
    if GRADIENT:
        tl.store(partials_ptr + 2 * stride, tl.sum(cg * cg, 0))


@triton.jit(do_not_specialize=["stride", "segments"])
def sum_partials(partials_ptr, first_ptr, out_ptr, stride, segments, BLOCK: tl.constexpr):
    """The sum of one quantity over one segment of chunks, in float64 and in the order of the chunks."""
    quantity, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    begin, end = tl.load(first_ptr + segment), tl.load(first_ptr + segment + 1)
    partials_ptr += quantity.to(tl.int64) * stride
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.float32))


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
    """(Σ d², Σ (c g) d[, Σ (c g)²]) in float32; contract and arguments as in `fsam_kernels.torch`.

    There is one launch for each combination of dtypes, and one that adds their partial sums.

    Raises:
        ValueError: as there, and for tensors that are not float32, bfloat16 or float16.
    """
    if not g:
        raise ValueError("g: at least one gradient is needed, got an empty list")
    quantities, segments = (3 if gradient else 2), (len(g) if per_tensor else 1)
    home = g[0].device
    total = torch.zeros(quantities, segments, device=home, dtype=torch.float32) if per_tensor else None
    found = []
    for plan in tables.plans((g, v if adam is not None else None), adam, mask):
        sums = _on_device(plan, clip, quantities, per_tensor)
        if total is None:
            found.append(sums.to(home))
        else:
            total[:, [entry.place for entry in plan.entries]] = sums.to(home)
    if total is None:
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0) if found else torch.zeros(3, 1, device=home)
    kind = NormsAndGradient if gradient else Norms
    return kind(*(x if per_tensor else x[0] for x in total[:quantities]))


def _on_device(plan: tables.Plan, clip: Tensor | float, quantities: int, per_tensor: bool) -> Tensor:
    """The sums as [quantities, tensors], or [quantities, 1]."""
    table = tables.table(plan, tables.direction_settings(plan), NEAREST, ())
    chunks, segments = len(plan.chunks), len(plan.entries) if per_tensor else 1
    partials = torch.empty(quantities, chunks, dtype=torch.float32, device=plan.device)
    out = torch.empty(quantities, segments, dtype=torch.float32, device=plan.device)
    first = plan.first if per_tensor else tables.ends(chunks, plan.device)
    factor = tables.as_scalar(clip, plan.device)
    with torch.cuda.device_of(table):
        for group in plan.groups:
            if group.chunks:
                norm_chunk[group.chunks,](
                    table, plan.chunks, factor, partials, group.start, chunks, G=group.types[0], V=group.types[1],
                    GRADIENT=quantities == 3, BLOCK=tables.BLOCK, num_warps=tables.WARPS, enable_fp_fusion=False,
                )  # fmt: skip
        sum_partials[quantities * segments,](
            partials, first, out, chunks, segments, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS, enable_fp_fusion=False
        )
    return out
