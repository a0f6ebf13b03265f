"""The head's options, the same in every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Layout = Literal["VD", "DV"]
Reduction = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Loss:
    """The loss of the logits u = h Wᵀ + b; the default is plain cross entropy.

    Attributes:
        label_smoothing: the share s of the target that is spread evenly over the vocabulary, 0 ≤ s < 1.
        z_loss: the factor ζ ≥ 0 of lse², which keeps the normaliser near 1 (1e-4 is usual).
        soft_cap: c > 0 for z = c tanh(u / c), which is part of the network, not of the loss; None for z = u.

    Raises:
        ValueError: for a value outside these.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be a finite number >= 0, got {self.z_loss!r}")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must be > 0, or None for no cap; got {self.soft_cap!r}")

    def floor(self, vocabulary: int) -> float:
        """s / V, which label smoothing subtracts from every entry of a row's cotangent."""
        return self.label_smoothing / vocabulary


CROSS_ENTROPY = Loss()


def check_reduction(reduction: str, has_weights: bool, has_count: bool) -> None:
    """Check that a reduction is known and uses the arguments that came with it.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be none, sum or mean; got {reduction!r}")
    if reduction == "none" and has_weights:
        raise ValueError("weights: reduction='none' returns each token's own loss; multiply it by them instead")
    if reduction != "mean" and has_count:
        raise ValueError(f"count: only reduction='mean' divides by it, got reduction={reduction!r}")
