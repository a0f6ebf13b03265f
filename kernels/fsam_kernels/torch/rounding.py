"""Rounding to bfloat16, to nearest or at random, bit-identical in every backend; formulas in `fsam_kernels.spec`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """How float32 is rounded to bfloat16.

    Random rounding takes one of the two neighbours of x, with probabilities that make x the mean. The draw depends on
    `seed`, `step`, the tensor's position in the list and the element's position in the tensor, and on nothing else.
    """

    stochastic: bool = False
    seed: int = 0
    step: int = 0


NEAREST = Rounding()
# Arrays that are written at the same time draw from different streams.
STREAMS = {"theta": 0, "exp_avg": 1, "exp_avg_sq": 2, "copy": 3}
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35  # the multipliers of MurmurHash3's 32-bit finaliser


def keys(rounding: Rounding, tensor: int, stream: str = "theta") -> tuple[int, int]:
    """Two 32-bit keys for a stream of a tensor, from a 64-bit hash (SplitMix64's finaliser, chained)."""
    x = 0
    for word in (rounding.seed, rounding.step, tensor, STREAMS[stream]):
        x = (x + (word & (2**64 - 1)) + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        x ^= x >> 31
    return x & (2**32 - 1), x >> 32


def check(rounding: Rounding, possible: bool) -> None:
    """Check that random rounding is `possible`, which it is to bfloat16 only; float32 results are not rounded.

    Raises:
        ValueError: for random rounding to another dtype.
    """
    if rounding.stochastic and not possible:
        raise ValueError("rounding: at random is to bfloat16 alone; use it, or Rounding(stochastic=False)")


def write(out: Tensor, x: Tensor, rounding: Rounding, tensor: int, at: int, stream: str = "theta") -> None:
    """Write `x`, the elements `at`, `at` + 1, … of a flat tensor, to `out`, rounded.

    Raises:
        ValueError: for random rounding of anything but float32 to bfloat16.
    """
    if not rounding.stochastic or out.dtype == x.dtype:
        out.copy_(x)
        return
    check(rounding, out.dtype == torch.bfloat16 and x.dtype == torch.float32)
    bits = _noise(x, at, *keys(rounding, tensor, stream))
    bits += x.view(torch.int32)
    out.view(torch.int16).copy_(bits >> 16)
    out.masked_fill_(torch.isnan(x), torch.nan)  # the upper half of a NaN may be an infinity


def _noise(like: Tensor, at: int, first: int, second: int) -> Tensor:
    """16 random bits for each element, as int32: the halves of the word at half its position, the low one first."""
    n, start = like.numel(), at // 2
    words = (at + n + 1) // 2 - start
    x = torch.arange(start, start + words, device=like.device).to(torch.int32)  # modulo 2³²
    other = torch.empty_like(x)
    x ^= _signed(first)
    _fold(x, 16, other)
    x *= _signed(FIRST)
    _fold(x, 13, other)
    x ^= _signed(second)
    x *= _signed(SECOND)
    _fold(x, 16, other)
    halves = torch.stack((x & 0xFFFF, (x >> 16) & 0xFFFF), 1).view(-1)
    return halves[at % 2 : at % 2 + n]


def _fold(x: Tensor, shift: int, other: Tensor) -> None:
    """x ^= x >> shift, for unsigned numbers."""
    torch.bitwise_right_shift(x, shift, out=other)
    other &= 2 ** (32 - shift) - 1
    x ^= other


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x
