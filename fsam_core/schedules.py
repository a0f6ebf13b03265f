"""Schedules: the steps with a correction, and the length of the perturbation, by the number of completed steps.

A step without a correction is a plain step at the cost of a plain step: PyTorch runs nothing else, and in JAX it is a
separate program. Everything depends on the step alone, so a resumed run continues with the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fsam_core.errors import UserError, check_choice, is_number, is_whole, numpy_to_python

Kind = Literal["corrected", "reused", "plain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kind of a step: with a correction, with the last correction reused, or with none."""
Between = Literal["plain", "reuse"]


@dataclass(frozen=True)
class Schedule:
    """The steps with a correction.

    Attributes:
        every: every k-th step from `start` on has a correction.
        start: the first step that may have one, in completed steps. All steps before it are plain.
        probability: the probability of a correction at each of these steps (RST, SS-SAM).
        seed: the seed of these draws.
        between: the other steps from `start` on: "plain", or "reuse" the last correction, as the method's `reuse` says,
            which needs one more array for each parameter.

    Raises:
        UserError: naming what is wrong.
    """

    every: int = 1
    start: int = 0
    probability: float = 1.0
    seed: int = 0
    between: Between = "plain"

    def __post_init__(self) -> None:
        numpy_to_python(self)
        for name, least in (("every", 1), ("start", 0), ("seed", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
        p = self.probability
        if not is_number(p) or not 0 <= p <= 1:
            raise UserError(f"probability must be in [0, 1], got {p!r}")
        check_choice("between", self.between, get_args(Between))

    def kind(self, step: int) -> Kind:
        """The kind of the step after `step` completed steps."""
        if step < self.start:
            return "plain"
        if (step - self.start) % self.every == 0 and self._drawn(step):
            return "corrected"
        return "reused" if self.between == "reuse" else "plain"

    def _drawn(self, step: int) -> bool:
        if self.probability in (0, 1):
            return bool(self.probability)
        return float(np.random.Generator(np.random.Philox([self.seed, step])).random()) < self.probability


ALWAYS = Schedule()


def cosine(rho: float, steps: int, final: float = 0.0) -> Callable[[Any], Any]:
    """ρ decays from `rho` to `final` · `rho` along a cosine over `steps` steps, then stays; for numbers and arrays.

    Raises:
        UserError: for steps below 1.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps!r}")

    def at(step: Any) -> Any:
        share = _least(step / steps, 1.0)
        return rho * (final + (1 - final) * 0.5 * (1 + _cos(math.pi * share)))

    return at


def tied(rho: float, learning_rate: Callable[[Any], Any], peak: float) -> Callable[[Any], Any]:
    """ρ proportional to a learning-rate schedule: `rho` at its `peak`.

    Raises:
        UserError: for a peak that is not > 0.
    """
    if not peak > 0:
        raise UserError(f"peak must be > 0, got {peak!r}")
    return lambda step: rho * (learning_rate(step) / peak)


def _least(x: Any, y: float) -> Any:
    return min(x, y) if isinstance(x, int | float) else x.clip(max=y)


def _cos(x: Any) -> Any:
    if isinstance(x, int | float):
        return math.cos(x)
    import jax.numpy as jnp  # x is a traced count, so JAX is installed

    return jnp.cos(x)


def check(schedule: Schedule, method: Any) -> None:
    """Check that the schedule works with the method.

    Raises:
        UserError: for between="reuse" with a method that does not compute the plain gradient.
    """
    if schedule.between == "reuse" and getattr(method, "form", "") == "split":
        raise UserError("between: 'reuse' needs the correction by itself, which form='split' does not compute")
    if schedule.between == "reuse" and getattr(method, "exact", False):
        ascent = method.direction
        if ascent.source != "full" and not (ascent.source == "part" and method.share == 1):
            raise UserError(
                f"between: 'reuse' needs the plain gradient, and fraction=1 with ascent={ascent.name!r} does not "
                "compute it; use between='plain', ascent='full', or a fraction below 1"
            )
