"""What a step in PyTorch tells about itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.torch.parallel import Parallel
from fsam_core.torch.perturbation import StepResult


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
    perturbation_error: float
    """‖ε‖₂ relative to its length with this step's own norms, minus 1: 0 but for norm_from="previous"."""
    skipped: bool
    """Whether the update was skipped because a loss or a norm of either pass was not finite."""

    @classmethod
    def of(cls, given: Sequence[float | None]) -> Info:
        """From the figures in the order of the fields; None for what was not evaluated."""
        numbers = [math.nan if x is None else x for x in given]
        numbers[-2:] = [0.0 if x is None else x for x in given[-2:]]
        return cls._make([*numbers, not all(math.isfinite(x) for x in given if x is not None)])


class Figures:
    """The figures of a step, on the device until `read`, which waits for them. They can be sent ahead of that.

    Attributes:
        values: those that were evaluated, [figures] in float64.
    """

    def __init__(self, *evaluated: Tensor | None) -> None:
        """As the fields of `Info` up to `skipped`; None, or left out at the end, for what was not evaluated."""
        given = [*evaluated, *[None] * (len(Info._fields) - 1 - len(evaluated))]
        found = [x.detach() for x in given if x is not None]
        if len({(x.device, x.dtype) for x in found}) == 1:
            self.values = torch.stack(found).double()
        else:
            self.values = torch.stack([x.to(found[0].device, torch.float64) for x in found])
        self._present = [x is not None for x in given]
        self._sent: tuple[Tensor, Any] | None = None

    @property
    def not_finite(self) -> Tensor:
        """1.0 where one of the figures is not finite, else 0.0; a float32 scalar on the device."""
        return (self.values * 0).sum().isnan().float()

    def send(self) -> None:
        """Begin to copy them to the host, where a device can do that by itself."""
        if self.values.device.type == "cuda":
            there = torch.empty(self.values.shape, dtype=torch.float64, pin_memory=True)
            there.copy_(self.values, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.values.device))
            self._sent = there, done

    def has_arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self.values.device.type == "cpu" or (self._sent is not None and self._sent[1].query())

    def read(self) -> Info:
        """The figures as numbers: the one place where the host waits for the device."""
        values = self.values
        if self._sent is not None:
            values, done = self._sent
            done.synchronize()
        numbers = iter(values.tolist())
        return Info.of([next(numbers) if present else None for present in self._present])


def over_ranks(
    parallel: Parallel, result: StepResult, norm: Any, *, local: bool
) -> tuple[Tensor, Any, Figures, Sequence[Any]]:
    """(loss, ‖ĝ‖₂, all figures, the norms that the next step may use) over all ranks.

    All ranks see the same, and so skip a step all or none.

    Args:
        norm: this rank's part of ‖ĝ‖₂ (`Parallel.local_norm`).
        local: whether each rank's perturbation follows its own gradient.
    """
    reduce: Callable[..., list[Any]] = parallel.all_reduce_scalars
    epsilon, norms = result.epsilon, list[Any]()
    length, error = epsilon.length if epsilon else None, None
    losses = result.loss, result.moved_loss
    if local:
        loss, moved, base, length, norm = reduce((*losses, result.base_norm, length), (norm,))
    elif epsilon is None or epsilon.norms is None or epsilon.divisor is None:
        loss, moved, base, norm = reduce(losses, (result.base_norm, norm))
    else:
        loss, moved, base, norm, length, *norms = reduce(losses, (result.base_norm, norm, length, *epsilon.norms))
        error = (norms[1] / epsilon.divisor).masked_fill(epsilon.divisor == 0, 0) - 1
    weight = result.weight if parallel.count == 1 else result.weight * parallel.count
    return loss, norm, Figures(loss, moved, weight, base, norm, length, error), norms
