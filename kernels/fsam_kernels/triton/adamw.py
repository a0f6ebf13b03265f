"""The AdamW update of many tensors in one launch.

It moves 28 bytes an element with float32 weights, gradients and moments (4 reads and 3 writes), and 2 more for a
bfloat16 copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    table_ptr, chunks_ptr, clip_ptr, skip_ptr, first, THETA: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, COPY: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of one chunk; COPY is None where no copy is written. Where `skip_ptr` holds 1, the copy alone."""
    row, start, left, aligned = tables.find(table_ptr, chunks_ptr, first, BLOCK)
    if (left >= BLOCK) & (aligned != 0):
        _adamw(row, start, left, clip_ptr, skip_ptr, THETA, G, M, V, COPY, RANDOM, BLOCK, FULL=True)
    else:
        _adamw(row, start, left, clip_ptr, skip_ptr, THETA, G, M, V, COPY, RANDOM, BLOCK, FULL=False)


@triton.jit
def _adamw(
    row, start, left, clip_ptr, skip_ptr, THETA: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    COPY: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    decay, rate, root, eps = (
        tables.setting(row, 0),
        tables.setting(row, 5),
        tables.setting(row, 6),
        tables.setting(row, 7),
    )
    g = tables.scaled(tables.load(row, 1, start, left, G, BLOCK, FULL), clip_ptr)
    b1, m_before = tables.setting(row, 1), tables.load(row, 2, start, left, M, BLOCK, FULL)
    m = b1 * m_before + tables.setting(row, 2) * g
    b2, v_before = tables.setting(row, 3), tables.load(row, 3, start, left, V, BLOCK, FULL)
    v = b2 * v_before + tables.setting(row, 4) * g * g
    theta_before = tables.load(row, 0, start, left, THETA, BLOCK, FULL)
    theta = theta_before - decay * theta_before
    theta -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if skip_ptr is not None:
        skips = tl.load(skip_ptr) != 0
        m, v, theta = tl.where(skips, m_before, m), tl.where(skips, v_before, v), tl.where(skips, theta_before, theta)
    weight = tables.rounded(theta, start, row, 7, THETA, BLOCK, RANDOM)
    tables.store(row, 0, start, left, weight, THETA, BLOCK, FULL)
    tables.store(row, 2, start, left, tables.rounded(m, start, row, 12, M, BLOCK, RANDOM), M, BLOCK, FULL)
    tables.store(row, 3, start, left, tables.rounded(v, start, row, 13, V, BLOCK, RANDOM), V, BLOCK, FULL)
    if COPY is not None:
        copy = tables.rounded(theta, start, row, 14, COPY, BLOCK, RANDOM)
        tables.store(row, 4, start, left, copy, COPY, BLOCK, FULL)


@triton.jit
def bias_corrections(table_ptr):
    """lr / (1 − β₁ᵗ) in place of lr, and sqrt(1 − β₂ᵗ), of one tensor, from its step count t in float64.

    β is taken from the float32 number 1 − β, which is as exact as the correction has to be.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 16
    t = tl.load(tl.load(row + 15).to(tl.pointer_type(tl.float32))).to(tl.int64)
    settings = row.to(tl.pointer_type(tl.float32)) + 16
    rate = tl.load(settings + 5) / (1.0 - _power(1.0 - tl.load(settings + 2).to(tl.float64), t))
    root = tl.sqrt(1.0 - _power(1.0 - tl.load(settings + 4).to(tl.float64), t))
    tl.store(settings + 5, rate.to(tl.float32))
    tl.store(settings + 6, root.to(tl.float32))


@triton.jit
def _power(base, exponent):
    """base ** exponent for a whole exponent ≥ 0."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


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
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW in place, in float32 arithmetic; contract and arguments as in `fsam_kernels.torch`.

    There is one launch for each combination of dtypes. Step counts on a device stay there: one more launch computes
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
        counts = _counts(plan, settings)  # kept until the launch, which takes their addresses
        on_device = counts is not None
        table = tables.table(plan, _settings(plan, settings, on_device), rounding, streams, changes=on_device)
        factor = tables.as_scalar(clip, plan.device)
        skip = None if found_inf is None else tables.as_scalar(found_inf, plan.device)
        with torch.cuda.device_of(table):
            if on_device:
                bias_corrections[len(plan.entries),](table, num_warps=1, enable_fp_fusion=False)
            for group in plan.groups:
                if group.chunks:
                    THETA, G, M, V, COPY = group.types
                    adamw_chunk[group.chunks,](
                        table, plan.chunks, factor, skip, group.start, THETA=THETA, G=G, M=M, V=V, COPY=COPY,
                        RANDOM=rounding.stochastic, BLOCK=tables.BLOCK, num_warps=tables.WARPS, enable_fp_fusion=False,
                    )  # fmt: skip


def _counts(plan: tables.Plan, settings: Sequence[Update]) -> list[Tensor] | None:
    """The step counts where one of them is on a device, there and with their addresses in the table; else None."""
    steps = [settings[entry.place].step for entry in plan.entries]
    if not any(isinstance(t, Tensor) and t.device.type != "cpu" for t in steps):
        return None
    found = [torch.as_tensor(t, dtype=torch.float32).to(plan.device) for t in steps]
    plan.table[:, tables.SCALE] = [t.data_ptr() for t in found]
    return found


def _settings(plan: tables.Plan, settings: Sequence[Update], counts_on_device: bool) -> list[Any]:
    """lr λ, β₁, 1 − β₁, β₂, 1 − β₂, lr / (1 − β₁ᵗ), sqrt(1 − β₂ᵗ), ε, computed in float64.

    With counts on the device the sixth and seventh are lr and 0, and `bias_corrections` replaces them.
    """
    mine = [settings[entry.place] for entry in plan.entries]
    names = Update._fields[: 5 if counts_on_device else 6]
    columns = [tables.column([getattr(one, name) for one in mine], plan.device) for name in names]
    lr, b1, b2, eps, decay, *step = columns
    if any(isinstance(x, Tensor) for x in ((lr, decay) if counts_on_device else columns)):
        # Those alone that are computed with: each that is sent is a launch, and each operation on it another.
        sent = lambda x: x if isinstance(x, Tensor) else tables.sent(x, plan.device)
        lr, decay = sent(lr), sent(decay)
        if not counts_on_device:
            b1, b2, *step = map(sent, (b1, b2, *step))
    rate, root = (lr / (1 - b1 ** step[0]), (1 - b2 ** step[0]) ** 0.5) if step else (lr, 0.0)
    return [lr * decay, b1, 1 - b1, b2, 1 - b2, rate, root, eps]


class AdamW(TorchAdamW):
    """`fsam_kernels.torch.AdamW` by this module's `adamw`."""

    update = staticmethod(adamw)
