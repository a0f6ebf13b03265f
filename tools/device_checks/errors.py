"""Errors of results against float64, over the errors that are allowed."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# The rounding of a stored result: half a unit in the last place. Triton's interpreter cuts bfloat16 off instead.
HALF_UNITS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
ARITHMETIC = 2e-5  # of float32: an exponential of a difference of up to some 60 has an error of 60 half units
SMALLEST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2**-24}  # half floats end at 2⁻²⁴


def worst(got: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """The largest |got − reference| over what is allowed: rounding, float32 arithmetic, and `floor`."""
    if got.numel() == 0:
        return 0.0
    relative = ARITHMETIC + 1.01 * HALF_UNITS[got.dtype]
    allowed = reference.abs().mul_(relative).add_(floor + SMALLEST[got.dtype])
    found = got.double().sub_(reference).abs_().div_(allowed).max().item()
    return math.inf if math.isnan(found) else found


def relative_norm(got: Tensor, reference: Tensor, allowed: float) -> float:
    """‖got − reference‖ / ‖reference‖ over `allowed`."""
    found = ((got.double() - reference).norm() / reference.norm()).item() / allowed
    return math.inf if math.isnan(found) else found
