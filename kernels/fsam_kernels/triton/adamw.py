"""The AdamW update of many tensors in one launch.

It moves 28 bytes an element with float32 weights, gradients and moments (4 reads and 3 writes), and 2 more for a
bfloat16 copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.adamw import AdamW as TorchAdamW
from fsam_kernels.torch.adamw import Update
from fsam_kernels.torch.rounding import Rounding
from fsam_kernels.triton import tables


@triton.jit(do_not_specialize=["first"])
def adamw_chunk(
    table_ptr, chunks_ptr, clip_ptr, first, THETA: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    COPY: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of one chunk; COPY is None where no copy is written."""
    row, start, left, aligned = tables.find(table_ptr, chunks_ptr, first, BLOCK)
    if (left >= BLOCK) & (aligned != 0):
        _adamw(row, start, left, clip_ptr, THETA, G, M, V, COPY, RANDOM, BLOCK, FULL=True)
    else:
        _adamw(row, start, left, clip_ptr, THETA, G, M, V, COPY, RANDOM, BLOCK, FULL=False)


@triton.jit
def _adamw(
    row, start, left, clip_ptr, THETA: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    COPY: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    decay, rate, root, eps = (
        tables.setting(row, 0),
        tables.setting(row, 5),
        tables.setting(row, 6),
        tables.setting(row, 7),
    )
    g = tables.scaled(tables.load(row, 1, start, left, G, BLOCK, FULL), clip_ptr)
    m = tables.setting(row, 1) * tables.load(row, 2, start, left, M, BLOCK, FULL) + tables.setting(row, 2) * g
    v = tables.setting(row, 3) * tables.load(row, 3, start, left, V, BLOCK, FULL) + tables.setting(row, 4) * g * g
    theta = tables.load(row, 0, start, left, THETA, BLOCK, FULL)
    theta -= decay * theta
    theta -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    weight = tables.rounded(theta, start, row, 7, THETA, BLOCK, RANDOM)
    tables.store(row, 0, start, left, weight, THETA, BLOCK, FULL)
    tables.store(row, 2, start, left, tables.rounded(m, start, row, 12, M, BLOCK, RANDOM), M, BLOCK, FULL)
    tables.store(row, 3, start, left, tables.rounded(v, start, row, 13, V, BLOCK, RANDOM), V, BLOCK, FULL)
    if COPY is not None:
        copy = tables.rounded(theta, start, row, 14, COPY, BLOCK, RANDOM)
        tables.store(row, 4, start, left, copy, COPY, BLOCK, FULL)


@torch.no_grad()
def adamw(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    settings: Sequence[Update],
    *,
    clip: Tensor | float = 1.0,
    copy: Sequence[Tensor] | None = None,
    rounding: Rounding = rounds.NEAREST,
) -> None:
    """One step of AdamW in place, in float32 arithmetic; contract and arguments as in `fsam_kernels.torch`.

    There is one launch for each combination of dtypes. Step counts on a device stay there: small launches compute
    1 − βᵗ.

    Raises:
        ValueError: as there, and for tensors that are not float32, bfloat16 or float16.
    """
    if len(settings) != len(theta):
        raise ValueError(f"settings: one for each of the {len(theta)} tensors is needed, got {len(settings)}")
    for plan in tables.plans((theta, g, exp_avg, exp_avg_sq, copy), written=5):
        for group in plan.groups:
            written = [group.types[i] for i in (0, 2, 3, 4)]
            rounds.check(rounding, all(x in (None, tl.bfloat16, tl.float32) for x in written))
        streams = ("theta", "exp_avg", "exp_avg_sq", "copy")
        table = tables.table(plan, _settings(plan, settings), rounding, streams)
        factor = tables.as_scalar(clip, plan.device)
        with torch.cuda.device_of(table):
            for group in plan.groups:
                if group.chunks:
                    THETA, G, M, V, COPY = group.types
                    adamw_chunk[group.chunks,](
                        table, plan.chunks, factor, group.start, THETA=THETA, G=G, M=M, V=V, COPY=COPY,
                        RANDOM=rounding.stochastic, BLOCK=tables.BLOCK, num_warps=tables.WARPS, enable_fp_fusion=False,
                    )  # fmt: skip


def _settings(plan: tables.Plan, settings: Sequence[Update]) -> list:
    """lr λ, β₁, 1 − β₁, β₂, 1 − β₂, lr / (1 − β₁ᵗ), sqrt(1 − β₂ᵗ), ε, computed in float64."""
    mine = [settings[entry.place] for entry in plan.entries]
    columns = [tables.column([getattr(one, name) for one in mine], plan.device) for name in Update._fields]
    if any(isinstance(x, Tensor) for x in columns):
        columns = [x if isinstance(x, Tensor) else tables.sent(x, plan.device) for x in columns]
    lr, b1, b2, eps, decay, step = columns
    return [lr * decay, b1, 1 - b1, b2, 1 - b2, lr / (1 - b1**step), (1 - b2**step) ** 0.5, eps]


class AdamW(TorchAdamW):
    """`fsam_kernels.torch.AdamW` by this module's `adamw`."""

    update = staticmethod(adamw)
