"""Ascents: the vector a that stands in the gradient's place in the perturbation, d = P a.

The published methods take the batch's own gradient. An ascent that is known before the step is cheaper: the exact
method then needs no base backward pass. What it gives up is another matter: functional corrections live on the batch
whose gradient they ascend. A new ascent is one more of these:

    surprise = Ascent("surprise", lambda seen: seen.map(lambda g, m: g - m, seen.gradient, seen.momentum))
    method = FunctionalSAM(rho=0.5, precondition="adam", ascent=surprise)

a takes g's place in every formula: in the norm, in the second moment that the direction folds it into, and in the
factor by which clipping would scale it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fsam_core.errors import UserError

Source = Literal["full", "part", "micro", "none"]


class Seen(Protocol):
    """What an ascent may look at; each is made when it is asked for. Trees in JAX, lists of tensors in PyTorch."""

    @property
    def gradient(self) -> Any:
        """The gradient at θ of the full batch or of the part; not there for an ascent without a source."""

    @property
    def momentum(self) -> Any:
        """AdamW's first moment before this step, zeros before the first."""

    @property
    def previous(self) -> Any:
        """The gradient ĝ of the last step that was taken, before clipping; zeros before the first."""

    def random(self) -> Any:
        """Standard normal, drawn from the method's seed and the number of completed steps."""

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """`function` of each parameter's arrays."""


@dataclass(frozen=True)
class Ascent:
    """Where the ascent vector comes from.

    Attributes:
        name: what tables and checkpoints call it.
        of: what is seen -> the vector, one array for each parameter.
        source: whose gradient `seen.gradient` is: the "full" batch's, that of a "part" of it, each "micro"-batch's for
            itself; "none" for a vector that is known before the step.
        remembers: whether `seen.previous` is looked at: one more array for each parameter is then kept.
    """

    name: str
    of: Callable[[Seen], Any]
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
        Ascent("previous", lambda seen: seen.previous, "none", remembers=True),
        Ascent("momentum", lambda seen: seen.momentum, "none"),
        Ascent("-momentum", lambda seen: seen.map(lambda m: -m, seen.momentum), "none"),
        Ascent("random", lambda seen: seen.random(), "none"),
    )
}


def named(ascent: str | Ascent) -> Ascent:
    """The ascent of that name, or the one that was given.

    Raises:
        UserError: for an unknown name.
    """
    if isinstance(ascent, Ascent):
        return ascent
    if ascent not in ASCENTS:
        raise UserError(f"ascent: {ascent!r} is not known; use one of {', '.join(ASCENTS)}, or an Ascent")
    return ASCENTS[ascent]
