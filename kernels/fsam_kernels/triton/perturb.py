"""The perturbed weights of many tensors in one launch.

It reads 12 bytes an element of float32 weights, gradients and moments, and writes the result; see `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.direction import Adam
from fsam_kernels.torch.perturb import new_like, with_masked
from fsam_kernels.torch.rounding import Rounding
from fsam_kernels.triton import tables


@triton.jit(do_not_specialize=["first"])
def perturb_chunk(
    table_ptr, chunks_ptr, clip_ptr, first,
    THETA: tl.constexpr, G: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ + scale · d of one chunk; V is None for the plain direction."""
    row, start, left, aligned = tables.find(table_ptr, chunks_ptr, first, BLOCK)
    scale = tl.load(tl.load(row + 15).to(tl.pointer_type(tl.float32)))
    if (left >= BLOCK) & (aligned != 0):
        _perturb(row, start, left, clip_ptr, scale, THETA, G, V, OUT, RANDOM, BLOCK, FULL=True)
    else:
        _perturb(row, start, left, clip_ptr, scale, THETA, G, V, OUT, RANDOM, BLOCK, FULL=False)


@triton.jit
def _perturb(
    row, start, left, clip_ptr, scale, THETA: tl.constexpr, G: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    d = tables.scaled(tables.load(row, 1, start, left, G, BLOCK, FULL), clip_ptr)
    if V is not None:
        d = tables.direction(d, tables.load(row, 2, start, left, V, BLOCK, FULL), row)
    moved = tables.load(row, 0, start, left, THETA, BLOCK, FULL) + scale * d
    moved = tables.rounded(moved, start, row, 7, OUT, BLOCK, RANDOM)
    tables.store(row, 3, start, left, moved, OUT, BLOCK, FULL)


@torch.no_grad()
def perturb(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor] | None,
    scale: Tensor,
    *,
    clip: Tensor | float = 1.0,
    adam: Sequence[Adam] | None = None,
    mask: Sequence[bool] | None = None,
    out: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    rounding: Rounding = rounds.NEAREST,
) -> list[Tensor]:
    """θ + scale · d, added in float32 and rounded once; contract and arguments as in `fsam_kernels.torch`.

    Raises:
        ValueError: as there, and for tensors that are not float32, bfloat16 or float16.
    """
    if scale.ndim and len(scale) != len(theta):
        raise ValueError(f"scale: one for each of the {len(theta)} tensors or one for all, got {len(scale)}")
    moved = list(out) if out is not None else new_like(theta, dtype, mask)
    for plan in tables.plans((theta, g, v if adam is not None else None, moved), adam, mask, written=1):
        for group in plan.groups:
            rounds.check(rounding, group.types[3] in (tl.bfloat16, tl.float32))
        step = scale.to(plan.device, torch.float32).contiguous()
        plan.table[:, tables.SCALE] = [step.data_ptr() + 4 * entry.place * step.ndim for entry in plan.entries]
        table = tables.table(plan, tables.direction_settings(plan), rounding, ("theta",))
        factor = tables.as_scalar(clip, plan.device)
        with torch.cuda.device_of(table):
            for group in plan.groups:
                if group.chunks:
                    THETA, G, V, OUT = group.types
                    perturb_chunk[group.chunks,](
                        table, plan.chunks, factor, group.start, THETA=THETA, G=G, V=V, OUT=OUT,
                        RANDOM=rounding.stochastic, BLOCK=tables.BLOCK, num_warps=tables.WARPS, enable_fp_fusion=False,
                    )  # fmt: skip
    return with_masked(theta, moved, mask)
