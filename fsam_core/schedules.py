"""At which steps there is a correction, and how long the perturbation is: functions of the number of completed steps.

A step without a correction is a plain step at a plain step's cost: in PyTorch nothing else is run, in JAX it is a
program of its own. Everything is a function of the step alone, so a run that is resumed goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fsam_core.errors import UserError

Kind = Literal["corrected", "reused", "plain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of a step: with a correction, with the last correction once more, or with none."""
Between = Literal["plain", "reuse"]


@dataclass(frozen=True)
class Schedule:
    """At which steps there is a correction.

    Attributes:
        every: a correction each k-th step from `start` on.
        start: the first step that may have one, in completed steps. Before it all steps are plain.
        probability: of a correction at a step where there could be one (RST, SS-SAM).
        seed: of those draws.
        between: what the steps between do: "plain" steps, or "reuse" the last correction (as LookSAM does), for one
            more array for each parameter.

    Raises:
        UserError: naming what is wrong.
    """

    every: int = 1
    start: int = 0
    probability: float = 1.0
    seed: int = 0
    between: Between = "plain"

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("start", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
        p = self.probability
        if not isinstance(p, int | float) or isinstance(p, bool) or not 0 <= p <= 1:
            raise UserError(f"probability must be in [0, 1], got {p!r}")
        if self.between not in get_args(Between):
            raise UserError(f"between: {self.between!r} is not known; use one of {', '.join(get_args(Between))}")

    def kind(self, step: int) -> Kind:
        """What the step after `step` completed ones is."""
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
    """ρ from `rho` down to `final` times it along a cosine over `steps` steps, then constant; for numbers and arrays.

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
    """ρ in proportion to a learning-rate schedule, `rho` at its `peak`.

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
    import jax.numpy as jnp  # a traced count, so JAX is there

    return jnp.cos(x)


def check(schedule: Schedule, method: Any) -> None:
    """Whether the steps between can do what the schedule says.

    Raises:
        UserError: for between="reuse" with a method that never forms the gradient its correction is a change of.
    """
    if schedule.between == "reuse" and getattr(method, "exact", False):
        ascent = method.direction
        if ascent.source != "full" and not (ascent.source == "part" and method.share == 1):
            raise UserError(
                f"between: 'reuse' needs the plain gradient, and fraction=1 with ascent={ascent.name!r} does not form "
                "it; use between='plain', ascent='full', or a fraction below 1"
            )
