"""What the loop asks of a framework; `jax/engine.py` and `torch/engine.py` provide it, `registry.make` chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class StepReport(NamedTuple):
    """What one step saw; norms are global, before clipping."""

    loss: float
    base_norm: float
    grad_norm: float
    perturbation_norm: float
    skipped: bool


class Writing(NamedTuple):
    """A copy of the state on its way to disk, whatever becomes of the state meanwhile."""

    write: Callable[[], Any]
    """Writes this rank's part, in any thread; what it returns is picklable."""
    finish: Callable[[list[Any]], None]
    """On the main rank alone, in any thread: takes what `write` returned on each, in their order."""


class Engine(Protocol):
    """A model, its optimizer and a compiled step on one framework."""

    backend: str
    device: str
    asynchronous: bool
    """Whether `step` returns before the work is done."""

    def prepare(self, tokens_BxL1: np.ndarray) -> None:
        """Compile the step for batches of this shape, so that the first step is timed like the others."""

    def step(self, tokens_BxL1: np.ndarray, index: int) -> Callable[[], StepReport]:
        """Start optimizer step `index` on this rank's rows (`processes.batches`); the returned function waits for it.

        Random draws depend on (seed, index); the kind of the step, its learning rate and ρ on the number of completed
        steps, in which a skipped one does not count.
        """

    def evaluate(self, batches: Sequence[np.ndarray]) -> float:
        """Mean loss a token over the batches, at θ, without dropout."""

    def state_bytes(self) -> int:
        """Bytes of what `save` writes."""

    def save(self, folder: Path) -> Writing:
        """Copy weights and optimizer state to the host, to be written into a new folder.

        All ranks call it; the next step may follow at once.

        Raises:
            UserError: when the disk refuses.
        """

    def restore(self, folder: Path) -> None:
        """Read them back, to the bit."""

    def weights(self) -> dict[str, np.ndarray]:
        """The weights by flat name."""
