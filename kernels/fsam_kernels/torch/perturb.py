"""The perturbed weights θ + ε of a list of tensors, in one pass over (θ, g, v)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsam_kernels.torch import multi_tensor
from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.direction import Adam, accum_dtype, as_clip, directions
from fsam_kernels.torch.rounding import Rounding


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
    """θ + scale · d, added in float32 and rounded once to the dtype of the result. θ is not modified.

    Nothing needs to be restored. For float32 weights the result is a second array, 4 bytes a weight, which the second
    pass reads in place of θ. Where the passes read bfloat16 weights cast from float32 masters, `out` is that compute
    copy (2 bytes a weight): the update or the next pass rewrites it from the masters.

    Args:
        theta: weights.
        g, v, clip, adam: as in `preconditioned_norm`.
        scale: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d), a scalar tensor on the same device, or one value for each tensor; the host
            does not wait for it.
        mask: False for tensors that are not perturbed: θ itself is returned, or rounded to `out`.
        out: tensors to write to, with the shapes of `theta`; None for new ones.
        dtype: dtype of new tensors; None for each weight's own.
        rounding: how bfloat16 results are rounded, to nearest or at random.

    Returns:
        the perturbed tensors: `out`, or new ones.

    Raises:
        ValueError: as `preconditioned_norm`, or for a scale of another length.
    """
    adam = adam if v is not None else None
    if scale.ndim and len(scale) != len(theta):
        raise ValueError(f"scale: one for each of the {len(theta)} tensors or one for all, got {len(scale)}")
    moved = list(out) if out is not None else new_like(theta, dtype, mask)
    lists = (g, v if adam is not None else None, theta, moved)
    if not rounding.stochastic and any(x.device.type != "cpu" for x in theta):
        _write_lists(lists, scale, as_clip(clip), adam, mask)
        return with_masked(theta, moved, mask)
    steps: dict[Any, float] = {}
    for entry, direction, parts in directions(lists, adam, clip, mask, written=1):
        home, accum = entry.arrays[0].device, accum_dtype(entry.arrays[0].dtype)
        key = (accum, direction.k, entry.place if scale.ndim else 0)
        step: Tensor | float | None = steps.get(key) if home.type == "cpu" else None
        if step is None:
            step = (scale[entry.place] if scale.ndim else scale).to(home, accum) * direction.k
            if home.type == "cpu":
                step = steps[key] = float(step)
        for at, (x, moment, weight, result) in parts:
            exact = result.dtype == accum
            sum_ = result if exact else direction.scratch("sum", weight, accum)
            direction.added(weight, x, moment, step, sum_)
            if not exact:
                rounds.write(result, sum_, rounding, entry.place, at)
    return with_masked(theta, moved, mask)


def _write_lists(
    lists: Sequence[Sequence[Tensor] | None],
    scale: Tensor,
    clip: Tensor | float,
    adam: Sequence[Adam] | None,
    mask: Sequence[bool] | None,
) -> None:
    """The same by operations on lists of tensors, for devices other than a CPU."""
    for batch in multi_tensor.batches(lists, adam, mask, written=1):
        g, v, theta, out = batch.arrays
        d, _, k, _ = multi_tensor.directions(g, v, batch.adam, clip)
        given = scale if not scale.ndim else scale[torch.tensor(batch.places).to(scale.device, non_blocking=True)]
        step = (given.to(d[0].device) * k).to(d[0].dtype)
        moved = torch._foreach_mul(d, list(step.unbind()) if step.ndim else step)
        torch._foreach_add_(moved, multi_tensor.upcast(theta, d[0].dtype))
        torch._foreach_copy_(out, moved)


def with_masked(theta: Sequence[Tensor], moved: list[Tensor], mask: Sequence[bool] | None) -> list[Tensor]:
    """The perturbed tensors, with θ in those that are masked."""
    for index in range(len(theta)):
        if mask is not None and not mask[index] and moved[index] is not theta[index]:
            moved[index].copy_(theta[index])
    return moved


def new_like(theta: Sequence[Tensor], dtype: torch.dtype | None, mask: Sequence[bool] | None) -> list[Tensor]:
    """Tensors for the result, with the weights' layout; the weight itself where it is not perturbed or cast."""
    perturbed = [True] * len(theta) if mask is None else mask
    return [
        torch.empty_like(x, dtype=dtype or x.dtype, requires_grad=False)
        if moves or (dtype or x.dtype) != x.dtype
        else x
        for x, moves in zip(theta, perturbed, strict=True)
    ]
