"""Ascents: the vector a that replaces the gradient in the perturbation, d = P a.

The published methods use the gradient of the batch. An ascent that is known before the step is cheaper, because the
exact method then needs no base backward pass. What it loses is within the intervals of docs/results/study.md. A new
ascent is an `Ascent` of one's own:

    surprise = Ascent("surprise", lambda seen: seen.map(lambda g, m: g - m, seen.gradient, seen.momentum))
    method = FunctionalSAM(rho=0.5, precondition="adam", ascent=surprise)

a replaces g in every formula: in the norm, in the second moment that g is folded into, and in the clipping factor.
An ascent may keep an array for each parameter from one step to the next (`Ascent.remembers`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from fsam_core.errors import UserError, check_choice

Source = Literal["full", "part", "micro", "rest", "none"]


class AscentInputs(Protocol):
    """The inputs of an ascent, computed on access: trees in JAX, lists of tensors in PyTorch."""

    @property
    def gradient(self) -> Any:
        """The gradient at θ of the ascent's source; an ascent with source "none" has none."""

    @property
    def momentum(self) -> Any:
        """AdamW's first moment before this step, zeros before the first."""

    @property
    def weights(self) -> Any:
        """θ."""

    @property
    def previous(self) -> Any:
        """What the ascent remembers from the last completed step; zeros before the first."""

    @property
    def memory(self) -> Any:
        """What the next step remembers, of an ascent with a memory of its own."""

    def random(self) -> Any:
        """Standard normal values, from the method's seed and the number of completed steps."""

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Apply `function` to each parameter's arrays."""


@dataclass(frozen=True)
class Ascent:
    """An ascent vector and the gradient it needs.

    Attributes:
        name: its name in tables and checkpoints.
        of: inputs -> the vector, one array for each parameter.
        source: the batch of `seen.gradient`: "full", a "part" of it, each "micro"-batch separately, or the "rest" of a
            split step; "none" for a vector that is known before the step.
        remembers: what goes to the next step as `seen.previous`, one more array for each parameter. False for nothing;
            True for the step's gradient ĝ before clipping; or inputs -> a memory of the ascent's own, which only steps
            with a correction change.

    Raises:
        UserError: naming what is wrong.
    """

    name: str
    of: Callable[[AscentInputs], Any]
    source: Source = "full"
    remembers: bool | Callable[[AscentInputs], Any] = False

    def __post_init__(self) -> None:
        if not callable(self.of):
            raise UserError(f"of must be a function of an ascent's inputs, got {self.of!r}")
        check_choice("source", self.source, get_args(Source))

    @property
    def known(self) -> bool:
        """Whether the vector is known before the step."""
        return self.source == "none"


def vasso(theta: float = 0.4) -> Ascent:
    """VaSSO (arXiv 2309.15639): the average d ← (1 − θ) d + θ g of the batches' gradients, from d = 0.

    Raises:
        UserError: for theta outside (0, 1].
    """
    if not 0 < theta <= 1:
        raise UserError(f"theta must be in (0, 1], got {theta!r} (0.4, say)")
    average = lambda seen: seen.map(lambda d, g: (1 - theta) * d + theta * g, seen.previous, seen.gradient)
    return Ascent("vasso", lambda seen: seen.memory, remembers=average)


def friendly(sigma: float = 1.0, decay: float = 0.9) -> Ascent:
    """Friendly-SAM (arXiv 2403.12350): g − σ m, with m ← λ m + (1 − λ) g from m = 0, and λ = `decay`.

    Raises:
        UserError: for a decay outside [0, 1), or a sigma that is not finite.
    """
    if not 0 <= decay < 1:
        raise UserError(f"decay must be in [0, 1), got {decay!r} (0.9, say)")
    if not math.isfinite(sigma):
        raise UserError(f"sigma must be a finite number, got {sigma!r} (1, say)")
    average = lambda seen: seen.map(lambda m, g: decay * m + (1 - decay) * g, seen.previous, seen.gradient)
    return Ascent(
        "friendly", lambda seen: seen.map(lambda g, m: g - sigma * m, seen.gradient, seen.memory), remembers=average
    )


ASCENTS: dict[str, Ascent] = {
    ascent.name: ascent
    for ascent in (
        Ascent("full", lambda seen: seen.gradient),
        Ascent("part", lambda seen: seen.gradient, "part"),
        Ascent("micro", lambda seen: seen.gradient, "micro"),
        Ascent("rest", lambda seen: seen.gradient, "rest"),
        Ascent("previous", lambda seen: seen.previous, "none", remembers=True),
        Ascent("momentum", lambda seen: seen.momentum, "none"),
        Ascent("-momentum", lambda seen: seen.map(lambda m: -m, seen.momentum), "none"),
        Ascent("random", lambda seen: seen.random(), "none"),
        vasso(),
        friendly(),
    )
}


def quantised(bits: int) -> Ascent:
    """Q(θ) − θ: with norm="none" and ρ = 1 the second pass is at weights rounded to so many bits.

    SAM is then quantisation-aware training with a straight-through gradient, in one pass. Q rounds to nearest, with one
    symmetric scale for each row of a matrix (all but its last axis); vectors stay as they are.

    Raises:
        UserError: for fewer than 2 bits.
    """
    if not isinstance(bits, int) or bits < 2:
        raise UserError(f"bits must be a whole number >= 2, got {bits!r}")
    levels = 2 ** (bits - 1) - 1

    def change(theta: Any) -> Any:
        if theta.ndim < 2:
            return theta * 0
        largest = abs(theta).amax(-1, keepdim=True) if hasattr(theta, "amax") else abs(theta).max(-1, keepdims=True)
        step = largest / levels
        return (theta / (step + (step == 0))).round() * step - theta

    return Ascent(f"quantised:{bits}", lambda seen: seen.map(change, seen.weights), "none")


def named(ascent: str | Ascent) -> Ascent:
    """The ascent of that name, "quantised:4" (of any number of bits) among them, or the given `Ascent` itself.

    Raises:
        UserError: for an unknown name.
    """
    if isinstance(ascent, Ascent):
        return ascent
    if isinstance(ascent, str) and (found := re.fullmatch(r"quantised:(\d+)", ascent)):
        return quantised(int(found[1]))
    if not isinstance(ascent, str) or ascent not in ASCENTS:
        raise UserError(f"ascent: {ascent!r} is not known; use one of {', '.join(ASCENTS)}, quantised:4, or an Ascent")
    return ASCENTS[ascent]
