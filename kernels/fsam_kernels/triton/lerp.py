"""x + share (y − x) over many tensors in one launch. It moves 12 bytes an element of float32 tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsam_kernels.torch.lerp import lerp_ as plain_lerp_
from fsam_kernels.torch.rounding import NEAREST
from fsam_kernels.triton import tables


@triton.jit(do_not_specialize=["first"])
def lerp_chunk(table_ptr, chunks_ptr, share_ptr, first, X: tl.constexpr, Y: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of x, in place."""
    row, start, left, aligned = tables.find(table_ptr, chunks_ptr, first, BLOCK)
    if (left >= BLOCK) & (aligned != 0):
        _lerp(row, start, left, share_ptr, X, Y, BLOCK, FULL=True)
    else:
        _lerp(row, start, left, share_ptr, X, Y, BLOCK, FULL=False)


@triton.jit
def _lerp(row, start, left, share_ptr, X: tl.constexpr, Y: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    share = tl.load(share_ptr)
    y, x = tables.load(row, 0, start, left, Y, BLOCK, FULL), tables.load(row, 1, start, left, X, BLOCK, FULL)
    # As PyTorch's: from the nearer end, so that shares of 0 and 1 give x and y themselves.
    z = tl.where(tl.abs(share) < 0.5, x + share * (y - x), y - (y - x) * (1.0 - share))
    tables.store(row, 1, start, left, z, X, BLOCK, FULL)


@torch.no_grad()
def lerp_(x: Sequence[Tensor], y: Sequence[Tensor], share: Tensor) -> None:
    """x ← x + share (y − x), in place; arguments as in `fsam_kernels.torch`.

    One launch for each combination of dtypes; float64 tensors are the plain backend's.
    """
    if any(each.dtype not in tables.TYPES for each in (*x, *y)):
        plain_lerp_(x, y, share)
        return
    for plan in tables.plans((y, x), written=1):
        table = tables.table(plan, [], NEAREST, ())
        factor = share.to(plan.device, torch.float32)
        with torch.cuda.device_of(table):
            for group in plan.groups:
                if group.chunks:
                    Y, X = group.types
                    lerp_chunk[group.chunks,](
                        table, plan.chunks, factor, group.start, X=X, Y=Y, BLOCK=tables.BLOCK, num_warps=tables.WARPS,
                        enable_fp_fusion=False,
                    )  # fmt: skip
