"""What a step in PyTorch tells about itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Info(NamedTuple):
    """The results of the last step; NaN if the method does not need a figure and it would cost a pass."""

    loss: float
    """Mean loss at θ, over the part of the batch that is evaluated there; at θ+ε for sam with a known ascent."""
    perturbed_loss: float
    """Mean loss at θ+ε, on S, where the method evaluates it (sam, logit)."""
    weight: float
    """Sum of the token weights over all micro-batches and ranks."""
    base_norm: float
    """‖g‖₂ of the plain gradient; for a split step that of R; with a scope, for the exact method and for `Staged`, over
    the scope's tensors."""
    grad_norm: float
    """‖ĝ‖₂ of the gradient the optimizer received, before clipping."""
    perturbation_norm: float
    """‖ε‖₂; 0 where nothing is perturbed."""
    skipped: bool
    """Whether the update was skipped because a loss or a norm of either pass was not finite."""

    @classmethod
    def read(cls, weight: Tensor, loss: Any, moved_loss: Any, base_norm: Any, norm: Tensor, length: Any) -> Info:
        """The figures as numbers: the one place where the host waits for the device."""
        given = [loss, moved_loss, weight, base_norm, norm, length]
        tensors = [x.detach().to(norm.device, torch.float64) for x in given if x is not None]
        values = iter(torch.stack(tensors).tolist())
        numbers = [math.nan if x is None else next(values) for x in given]
        evaluated = [number for number, x in zip(numbers, given, strict=True) if x is not None]
        numbers[-1] = 0.0 if length is None else numbers[-1]
        return Info._make([*numbers, not all(map(math.isfinite, evaluated))])
