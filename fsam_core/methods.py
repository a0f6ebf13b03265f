"""Methods as data: which perturbation, and which half of the gradient is moved by it.

Notation (the same everywhere in this project):

    z = F(θ; x)      logits                       g  = J(θ)ᵀ z̄(θ)        the plain gradient
    z̄ = ∂L/∂z        the logit cotangent          J  = ∂F/∂θ              the network's Jacobian
    d = P g          ascent direction             ε  = ρ d / ‖d‖          the perturbation

    path "base"        ĝ = J(θ)ᵀ   z̄(θ)          AdamW
    path "sam"         ĝ = J(θ+ε)ᵀ z̄(θ+ε)        Foret et al., arXiv 2010.01412
    path "functional"  ĝ = J(θ+ε)ᵀ z̄(θ)          Singh et al., arXiv 2502.02407
    path "logit"       ĝ = J(θ)ᵀ   z̄(θ+ε)        its complement, for diagnosis

That is the gradient g' of a whole batch B. On a part S of it the same method is a correction,

    ĝ = g_B + w (g'_S − g_S),     S ⊆ B a share `fraction` of the batch, w the `strength`,

which keeps the full batch's gradient and estimates the change alone; S = B and w = 1 give g' itself.

The preconditioner's exact form and its normalisation are this project's choices, not the paper's; see `spec.py` in
`fsam_kernels` for the formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fsam_core.errors import UserError

Path = Literal["base", "sam", "functional", "logit"]
Precondition = Literal["adam"]
Norm = Literal["l2", "dual"]
SecondMoment = Literal["current", "previous"]
Ascent = Literal["full", "part"]
Cut = Literal["logits", "hidden"]
Rho = float | Callable[[Any], Any]


@dataclass(frozen=True)
class Plain:
    """No perturbation: the gradient of the loss itself. Under AdamW this is AdamW."""

    path: ClassVar[Path] = "base"


@dataclass(frozen=True)
class Perturbed:
    """What the three perturbed methods share. Not used itself: see `SAM`, `FunctionalSAM` and `LogitSAM`.

    Attributes:
        rho: length of the perturbation, ≥ 0, in the units of the weights; or a function of the number of completed
            optimizer steps that returns it (an optax schedule in JAX, any Python function in PyTorch).
        precondition: None for d = g (the published SAM direction), "adam" for d = g / (sqrt(v̂) + δ).
        norm: "l2" for ε = ρ d / ‖d‖₂, "dual" for ε = ρ d / sqrt(gᵀ d).
        second_moment: "current" folds this step's gradient into v̂ before it is used, "previous" takes the optimizer's
            as it stands. With "previous" a token seen for the first time has v = 0 and takes the whole perturbation.
        fraction: share of the batch that the correction is computed on, 0 < q ≤ 1. The second pass costs q of a whole
            one; below 1 one more gradient is held. It must cut the batch into whole rows, or whole micro-batches.
        strength: factor w ≥ 0 of the correction.
        ascent: whose gradient ε comes from: the "full" batch's, or that of the "part" S (as in m-sharpness).
        cut: where the functional method holds the cotangent. At the "logits" it is the published method. At the last
            "hidden" states the second pass pulls back h̄ = z̄ W(θ), the head's own gradient stays that of θ, and the
            pass touches no vocabulary: a near twin of the method, whose quality is to be judged.

    Raises:
        UserError: for a value outside these, where the method is made and not later.
    """

    rho: Rho
    precondition: Precondition | None = None
    norm: Norm = "l2"
    second_moment: SecondMoment = "current"
    fraction: float = 1.0
    strength: float = 1.0
    ascent: Ascent = "full"
    cut: Cut = "logits"

    path: ClassVar[Path]

    def __post_init__(self) -> None:
        if not hasattr(type(self), "path"):
            raise UserError("method: Perturbed has no path of its own; use SAM, FunctionalSAM or LogitSAM")
        check_rho(self.rho(0) if callable(self.rho) else self.rho, "rho(0)" if callable(self.rho) else "rho")
        _check_choice("precondition", self.precondition, (None, *get_args(Precondition)))
        _check_choice("norm", self.norm, get_args(Norm))
        _check_choice("second_moment", self.second_moment, get_args(SecondMoment))
        _check_choice("ascent", self.ascent, get_args(Ascent))
        _check_choice("cut", self.cut, get_args(Cut))
        if self.cut == "hidden" and self.path != "functional":
            raise UserError(f"cut: 'hidden' needs the functional method, which holds its cotangent; got {self.path!r}")
        if not _is_number(self.fraction) or not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be a number in (0, 1], got {self.fraction!r} (1/8, say)")
        if not _is_number(self.strength) or not 0 <= self.strength < math.inf:
            raise UserError(f"strength must be a finite number >= 0, got {self.strength!r}")

    @property
    def exact(self) -> bool:
        """Whether ĝ is g' itself: the correction on the whole batch, at full strength."""
        return self.fraction == 1 and self.strength == 1

    def rho_at(self, step: Any) -> Any:
        """ρ after `step` completed optimizer steps; `step` may be an int or a traced array."""
        return self.rho(step) if callable(self.rho) else self.rho


@dataclass(frozen=True)
class SAM(Perturbed):
    """Sharpness-aware minimisation: the gradient of the loss at θ+ε."""

    path: ClassVar[Path] = "sam"


@dataclass(frozen=True)
class FunctionalSAM(Perturbed):
    """Functional-SAM: the Jacobian at θ+ε, the logit cotangent of the unperturbed θ."""

    path: ClassVar[Path] = "functional"


@dataclass(frozen=True)
class LogitSAM(Perturbed):
    """The complement of Functional-SAM: the Jacobian at θ, the logit cotangent of θ+ε. A diagnosis, not a method."""

    path: ClassVar[Path] = "logit"


Method = Plain | Perturbed

# Name on the command line -> (class, preconditioner). One name per published method; every saving is an option.
_NAMED: dict[str, tuple[type[Method], Precondition | None]] = {
    "adamw": (Plain, None),
    "sam": (SAM, None),
    "precond-sam": (SAM, "adam"),
    "functional-sam": (FunctionalSAM, None),
    "precond-functional-sam": (FunctionalSAM, "adam"),
    "logit-sam": (LogitSAM, None),
}
NAMES: tuple[str, ...] = tuple(_NAMED)


def named(name: str, rho: Rho = 0.5, *, argument: str = "method", **options: Any) -> Method:
    """The method called `name` (one of `NAMES`) with options of `Perturbed`; `argument` is what an error calls it.

    Raises:
        UserError: for an unknown name, or for options outside what `Perturbed` lists.
    """
    _check_choice(argument, name, NAMES)
    kind, precondition = _NAMED[name]
    if not issubclass(kind, Perturbed):
        # AdamW ignores the options, but a wrong one is still a mistake of the person who typed it.
        FunctionalSAM(rho, **options)
        return kind()
    return kind(rho, precondition, **options)


def describe(method: Method) -> dict[str, Any]:
    """The method as plain values, for metrics and checkpoints."""
    values = dataclasses.asdict(method)
    if callable(values.get("rho")):
        values["rho"] = repr(values["rho"])
    return {"path": method.path, **values}


def check_rho(value: Any, argument: str = "rho") -> float:
    """`value` as a float ρ ≥ 0.

    Raises:
        UserError: when it is not a finite number ≥ 0.
    """
    try:
        rho = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        rho = math.nan
    if not math.isfinite(rho) or rho < 0:
        raise UserError(f"{argument} must be a finite number >= 0, got {value!r} (the paper's best values are 0.4–0.5)")
    return rho


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(argument: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{argument}: {value!r} is not known; use one of {', '.join(map(str, allowed))}")
