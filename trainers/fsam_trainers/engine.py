"""What the loop asks of a framework; `jax/engine.py` and `torch/engine.py` provide it, `registry.make` chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch


class StepReport(NamedTuple):
    """What one step saw; norms are global, before clipping."""

    loss: float
    base_norm: float
    grad_norm: float
    perturbation_norm: float
    skipped: bool


class Correction(NamedTuple):
    """How far the method's gradient ĝ is from the plain gradient g of the same batch."""

    correction_ratio: float
    """‖ĝ − g‖ / ‖g‖."""
    correction_cosine: float
    """cos(ĝ, g)."""

    @classmethod
    def of(cls, g: float, g_hat: float, difference: float, product: float) -> Correction:
        """From ‖g‖², ‖ĝ‖², ‖ĝ − g‖² and ĝᵀg."""
        return cls(math.sqrt(difference / (g or math.nan)), product / math.sqrt(g * g_hat or math.nan))


class Writing(NamedTuple):
    """A copy of the state on its way to disk, whatever becomes of the state meanwhile."""

    write: Callable[[], Any]
    """Writes this rank's part, in any thread; what it returns is picklable."""
    finish: Callable[[list[Any]], None]
    """On the main rank alone, in any thread: takes what `write` returned on each, in their order."""


class Evaluation(NamedTuple):
    """What a model is worth on held-out data."""

    loss: float
    """Mean a target."""
    accuracies: dict[str, float]
    """Of images, "val_accuracy", and "val_top5" where there are more than ten classes; empty of text."""

    @classmethod
    def of(cls, loss: float, top: tuple[int, ...], correct: Sequence[float], targets: float) -> Evaluation:
        """correct: of `targets` images, those whose label is among the k likeliest classes, for each k of `top`."""
        names = ("val_accuracy" if k == 1 else f"val_top{k}" for k in top)
        return cls(loss, {name: x / max(targets, 1) for name, x in zip(names, correct, strict=True)})


class Engine(Protocol):
    """A model, its optimizer and a compiled step on one framework."""

    backend: str
    device: str
    asynchronous: bool
    """Whether `step` returns before the work is done, and before its figures are on the host."""

    def prepare(self, batch: Batch) -> None:
        """Compile the step for batches of this shape, so that the first step is timed like the others."""

    def step(self, batch: Batch, index: int) -> Callable[[], StepReport]:
        """Start optimizer step `index` on this rank's rows (`processes.batches`); the returned function waits for it.

        It may be called after the next step was started, which does not wait for it where it need not.
        Random draws depend on (seed, index); the kind of the step, its learning rate and ρ on the number of completed
        steps, in which a skipped one does not count.
        """

    def correction(self, batch: Batch, index: int) -> Correction | None:
        """What a corrected step would make of this rank's rows at the present weights; nothing changes.

        None for AdamW, and for a half-precision model whose losses are scaled.
        """

    def evaluate(self, batches: Sequence[Batch], average: bool = True) -> Evaluation:
        """Over all targets of the batches, without dropout, at the average of the weights if there is one.

        Args:
            average: False for the weights themselves.
        """

    def state_bytes(self) -> int:
        """Bytes of what `save` writes."""

    def save(self, folder: Path) -> Writing:
        """Copy weights and optimizer state to the host, to be written into a new folder.

        All ranks call it; the next step may follow at once.

        Raises:
            UserError: when the disk refuses.
        """

    def restore(self, folder: Path, source: Settings | None = None) -> None:
        """Read them back, to the bit.

        Args:
            source: the settings of the run that saved them, if it is another one. Then weights, moments and the number
                of completed steps are read, the average if both runs have one, and nothing that belongs to the method.
        """

    def weights(self) -> dict[str, np.ndarray]:
        """The weights by flat name."""
