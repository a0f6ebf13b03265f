"""Ascents: the vector a that replaces the gradient in the perturbation, d = P a.

The published methods use the gradient of the batch. An ascent that is known before the step is cheaper, because the
exact method then needs no base backward pass. It loses quality (docs/results/study.md): a functional correction works
on the batch whose gradient the ascent follows. A new ascent is an `Ascent` of one's own:

    surprise = Ascent("surprise", lambda seen: seen.map(lambda g, m: g - m, seen.gradient, seen.momentum))
    method = FunctionalSAM(rho=0.5, precondition="adam", ascent=surprise)

a replaces g in every formula: in the norm, in the second moment that g is folded into, and in the clipping factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fsam_core.errors import UserError

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
        """The gradient ĝ of the last completed step, before clipping; zeros before the first."""

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
        remembers: whether it uses `seen.previous`, which needs one more array for each parameter.
    """

    name: str
    of: Callable[[AscentInputs], Any]
    source: Source = "full"
    remembers: bool = False

    @property
    def known(self) -> bool:
        """Whether the vector is known before the step."""
        return self.source == "none"


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

    return Ascent(f"quantised to {bits} bits", lambda seen: seen.map(change, seen.weights), "none")


def named(ascent: str | Ascent) -> Ascent:
    """The ascent of that name, or the given `Ascent` itself.

    Raises:
        UserError: for an unknown name.
    """
    if isinstance(ascent, Ascent):
        return ascent
    if ascent not in ASCENTS:
        raise UserError(f"ascent: {ascent!r} is not known; use one of {', '.join(ASCENTS)}, or an Ascent")
    return ASCENTS[ascent]
