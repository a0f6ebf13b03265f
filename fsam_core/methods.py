"""Methods as data: the perturbation, and which part of the gradient is taken at the perturbed weights.

Notation (the same everywhere in this project):

    z = F(θ; x)      logits                       g  = J(θ)ᵀ z̄(θ)        the plain gradient
    z̄ = ∂L/∂z        the logit cotangent          J  = ∂F/∂θ              the network's Jacobian
    d = P g          ascent direction             ε  = ρ d / ‖d‖          the perturbation

    path "base"        ĝ = J(θ)ᵀ   z̄(θ)          AdamW
    path "sam"         ĝ = J(θ+ε)ᵀ z̄(θ+ε)        Foret et al., arXiv 2010.01412
    path "functional"  ĝ = J(θ+ε)ᵀ z̄(θ)          Singh et al., arXiv 2502.02407
    path "logit"       ĝ = J(θ)ᵀ   z̄(θ+ε)        its complement, for diagnosis

These are the gradients g' of a whole batch B. On a part S of it the same method is a correction,

    ĝ = g_B + w (g'_S − g_S),     S ⊆ B a share `fraction` of the batch, w the `strength`.

It keeps the full batch's gradient and estimates only the change; S = B and w = 1 give g' itself. With w = |S| / |B|
g_S cancels, and no token is passed twice: this is the `form` "split",

    ĝ = (|R| g_R + |S| g'_S) / |B|,     R the rest of the batch, ε of length ρ / q along g_R.

To first order in ρ its correction is that of the whole batch's method at radius ρ. The `ascent` gives the direction of
ε (`fsam_core.ascents`), the `scope` the weights that are perturbed (`fsam_core.scopes`), and the schedule the steps
with a correction (`fsam_core.schedules`).

The preconditioner's exact form and its normalisation are this project's choices, not the paper's; formulas:
`fsam_kernels/spec.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from fsam_core import ascents, scopes
from fsam_core.ascents import Ascent
from fsam_core.errors import UserError, check_choice, is_number, is_whole, numpy_to_python
from fsam_core.scopes import Scope

Path = Literal["base", "sam", "functional", "logit"]
Precondition = Literal["adam", "weights"]
Norm = Literal["l2", "dual", "per-tensor", "none"]
SecondMoment = Literal["current", "previous"]
Cut = Literal["logits", "hidden"]
Form = Literal["correction", "split"]
Rho = float | Callable[[Any], Any]
NormFrom = Literal["current", "previous"]
Combine = Callable[[Any, Any, Any], tuple[Any, Any]]
Direction = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Reuse:
    """How the steps between two corrected ones use the last correction c (`Schedule(between="reuse")`).

    Attributes:
        store: (g·g, g·ĝ, ĝ·ĝ) of a corrected step -> (α, β) of c = α g + β ĝ, g the gradient of the batch at θ.
        apply: (g·g, g·c, c·c) of a later step -> (α, β) of its ĝ = α g + β c.
    """

    store: Combine
    apply: Combine


@dataclass(frozen=True)
class Plain:
    """No perturbation: the gradient of the loss itself. Under AdamW this is AdamW."""

    path: ClassVar[Path] = "base"


@dataclass(frozen=True)
class Perturbed:
    """The options of the perturbed methods `SAM`, `FunctionalSAM` and `LogitSAM`; it is not a method itself.

    Attributes:
        rho: length of the perturbation, ≥ 0, in the units of the weights; or a function of the number of completed
            optimizer steps that returns it (an optax schedule in JAX, any Python function in PyTorch).
        precondition: None for d = g (the published SAM direction), "adam" for d = g / (sqrt(v̂) + δ), "weights" for
            d = (|θ| + η)² g (ASAM's, with norm="dual"), or a function of one tensor's (θ, g, v̂) that returns its d.
        norm: "l2" for ε = ρ d / ‖d‖₂; "dual" for ε = ρ d / sqrt(gᵀ d); "per-tensor" for l2 in each tensor separately,
            so that every tensor's ε has length ρ; "none" for ε = ρ d (and no clipping in it).
        norm_from: "current", or "previous" for the norms of the step before, both in ε and in the clipping factor: then
            nothing waits for a norm between the two passes, and ‖ε‖ is ρ only about (`Info.perturbation_error`). The
            first step is not perturbed.
        eta: η of precondition="weights".
        second_moment: "current" folds this step's gradient into v̂ first; "previous" uses the optimizer's moment as it
            is. With "previous" a token seen for the first time has v = 0 and takes the whole perturbation.
        fraction: the share q of the batch on which the correction is computed, 0 < q ≤ 1. The second pass costs q of a
            full one; below 1 one more gradient is stored. It must cut the batch into whole rows or micro-batches.
        strength: factor w ≥ 0 of the correction.
        combine: None for ĝ = g', or a function of (g·g, g·g', g'·g') that returns (α, β) of ĝ = α g + β g'
            (`fsam_core.combining`). It needs fraction 1, strength 1 and the full ascent, and stores g.
        reuse: None for ĝ = g + (the last ĝ − g) at the steps that reuse a correction, or a `Reuse`.
        form: "correction" for ĝ = g_B + w (g'_S − g_S); "split" for the step at the price of a plain one, in which S is
            only passed at θ+ε (and forwards at θ for the functional method) and the rest only at θ. It needs a fraction
            below 1, and ascent="rest" or one that is known before the step. The length of ε is rho / fraction.
        ascent: the vector that replaces the gradient in d: the gradient of the "full" batch, of a "part" of it, of each
            "micro"-batch separately (m-sharpness), or of the "rest" (form="split"); the "previous" step's gradient;
            "momentum" or "-momentum" (AdamW's first moment); "random"; or an `Ascent`. With an ascent that is known
            before the step the exact method needs no base backward pass.
        ascent_fraction: with ascent="part", the share of the batch; None for `fraction`. Any other value needs
            fraction 1: the correction is then that of the whole batch along the ascent of a part.
        scope: the weights that are perturbed: "all", "no-head", "norms", "top:K" (the K last blocks and everything
            above them), or a function of a parameter's name. The gradient is still taken with respect to all weights.
        seed: seed of the random ascent; a step's draw depends on it and on the number of completed steps.
        cut: where the functional method stores the cotangent. At the "logits" it is the published method. At the last
            "hidden" states the second pass starts from h̄ = z̄ W(θ), takes the head's own gradient at θ, and contains no
            product with the vocabulary. This is an approximation of the method; docs/results/study.md measures it.

    Raises:
        UserError: for any other value, when the method is constructed.
    """

    rho: Rho
    precondition: Precondition | Direction | None = None
    norm: Norm = "l2"
    norm_from: NormFrom = "current"
    eta: float = 0.01
    second_moment: SecondMoment = "current"
    fraction: float = 1.0
    strength: float = 1.0
    combine: Combine | None = None
    reuse: Reuse | None = None
    form: Form = "correction"
    ascent: str | Ascent = "full"
    ascent_fraction: float | None = None
    scope: Scope = "all"
    cut: Cut = "logits"
    seed: int = 0

    path: ClassVar[Path]

    def __post_init__(self) -> None:
        if not hasattr(type(self), "path"):
            raise UserError("method: Perturbed has no path of its own; use SAM, FunctionalSAM or LogitSAM")
        numpy_to_python(self)
        check_rho(self.rho(0) if callable(self.rho) else self.rho, "rho(0)" if callable(self.rho) else "rho")
        if not callable(self.precondition):
            check_choice("precondition", self.precondition, (None, *get_args(Precondition)))
        if not is_number(self.eta) or not 0 <= self.eta < math.inf:
            raise UserError(f"eta must be a finite number >= 0, got {self.eta!r}")
        check_choice("norm", self.norm, get_args(Norm))
        check_choice("norm_from", self.norm_from, get_args(NormFrom))
        check_choice("second_moment", self.second_moment, get_args(SecondMoment))
        scopes.check(self.scope)
        ascent = self.direction
        check_choice("cut", self.cut, get_args(Cut))
        if self.cut == "hidden" and self.path != "functional":
            raise UserError(f"cut: 'hidden' needs the functional method, which stores its cotangent; got {self.path!r}")
        if not is_number(self.fraction) or not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be a number in (0, 1], got {self.fraction!r} (1/8, say)")
        if not is_number(self.strength) or not 0 <= self.strength < math.inf:
            raise UserError(f"strength must be a finite number >= 0, got {self.strength!r}")
        share = self.ascent_fraction
        if share is not None:
            if not is_number(share) or not 0 < share <= 1:
                raise UserError(f"ascent_fraction must be a number in (0, 1], got {share!r} (1/4, say)")
            if ascent.source != "part" or (self.fraction != 1 and share != self.fraction):
                got = f"ascent={self.ascent!r} and fraction={self.fraction}"
                raise UserError(f"ascent_fraction: {share} goes with ascent='part' and fraction=1, got {got}")
        if ascent.source == "micro" and not self.exact:
            raise UserError(
                f"ascent: 'micro' corrects every micro-batch; it needs fraction=1 and strength=1, got "
                f"{self.fraction} and {self.strength}"
            )

        if self.norm_from == "previous" and (self.norm in ("none", "per-tensor") or ascent.source == "micro"):
            got = f"norm={self.norm!r} and ascent={ascent.name!r}"
            raise UserError(f"norm_from: 'previous' needs one ascent with norm='l2' or 'dual', got {got}")
        if self.norm_from == "previous" and self.reuse is not None:
            raise UserError("norm_from: 'previous' does not perturb the first step, and `reuse` needs its correction")
        if ascent.source == "micro" and callable(ascent.remembers):
            raise UserError(f"ascent: {ascent.name!r} has one memory, and its source 'micro' is several ascents")
        check_choice("form", self.form, get_args(Form))
        if not (self.combine is None or callable(self.combine)):
            raise UserError(f"combine must be a function of (g·g, g·g', g'·g') or None, got {self.combine!r}")
        if not (self.reuse is None or isinstance(self.reuse, Reuse)):
            raise UserError(f"reuse must be a Reuse, as combining.looksam(0.5) is, or None; got {self.reuse!r}")
        if not (is_whole(self.seed) and 0 <= self.seed < 2**32):
            raise UserError(f"seed must be a whole number in [0, 2**32), got {self.seed!r}")
        if self.combine is not None and not (self.exact and ascent.source == "full"):
            got = f"fraction={self.fraction}, strength={self.strength} and ascent={ascent.name!r}"
            raise UserError(f"combine: it needs g and g' of the whole batch, and so the full ascent; got {got}")
        if self.form == "split":
            self._check_split()
        elif ascent.source == "rest":
            raise UserError("ascent: 'rest' goes with form='split'; use 'full' or 'part'")

    def _check_split(self) -> None:
        if self.path == "logit":
            raise UserError("form: 'split' takes SAM or FunctionalSAM; LogitSAM needs two passes over S at θ")
        if self.fraction == 1 or self.strength != 1:
            got = f"fraction={self.fraction} and strength={self.strength}"
            raise UserError(f"form: 'split' needs a fraction below 1 (1/2, say), which is its strength too; got {got}")
        if self.direction.source not in ("rest", "none"):
            raise UserError(
                f"form: 'split' takes ε from the rest of the batch or from an ascent known before the step; use "
                f"ascent='rest', got {self.ascent!r}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is computed from them has functions, which cannot be pickled."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def exact(self) -> bool:
        """Whether ĝ = g': the correction is computed on the whole batch, at strength 1."""
        return self.fraction == 1 and self.strength == 1

    @cached_property
    def direction_of(self) -> Direction | None:
        """(θ, g, v̂) -> d of one tensor, for a preconditioner that is such a function."""
        if self.precondition == "weights":
            return lambda theta, g, v: (abs(theta) + self.eta) ** 2 * g
        return self.precondition if callable(self.precondition) else None

    @property
    def needs_v(self) -> bool:
        """Whether the direction takes AdamW's second moment."""
        return self.precondition == "adam" or callable(self.precondition)

    @cached_property
    def direction(self) -> Ascent:
        """The `Ascent`, also where it was given by name.

        Raises:
            UserError: for an unknown name.
        """
        return ascents.named(self.ascent)

    @cached_property
    def share(self) -> float:
        """The share of the batch whose gradient the ascent "part" is."""
        return self.fraction if self.ascent_fraction is None else self.ascent_fraction

    @cached_property
    def cut_at(self) -> float:
        """The share at which a batch is cut: that of S, or of the part whose gradient is the ascent."""
        return self.share if self.direction.source == "part" else self.fraction

    def rho_at(self, step: Any) -> Any:
        """The length of ε after `step` completed optimizer steps; `step` may be an int or a traced array."""
        rho = self.rho(step) if callable(self.rho) else self.rho
        return rho / self.fraction if self.form == "split" else rho


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
    """The complement of Functional-SAM: the Jacobian at θ, the logit cotangent of θ+ε. For diagnosis, not training."""

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
    """The method called `name` (one of `NAMES`) with options of `Perturbed`; errors call the name `argument`.

    Raises:
        UserError: for an unknown name, or for options that `Perturbed` refuses.
    """
    check_choice(argument, name, NAMES)
    kind, precondition = _NAMED[name]
    if not issubclass(kind, Perturbed):
        # AdamW ignores the options, but a wrong one is still reported.
        FunctionalSAM(rho, **options)
        return kind()
    return kind(rho, precondition, **options)


def describe(method: Method) -> dict[str, Any]:
    """The method as plain values, for metrics and checkpoints."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    for name in ("rho", "scope", "precondition", "combine", "reuse"):
        if callable(values.get(name)) or isinstance(values.get(name), Reuse):
            values[name] = repr(values[name])
    if isinstance(values.get("ascent"), Ascent):
        values["ascent"] = values["ascent"].name
    return {"path": method.path, **values}


def check_method(method: Any) -> None:
    """Check that this is a method.

    Raises:
        UserError: for anything else.
    """
    if not isinstance(method, Plain | Perturbed):
        raise UserError(f"method must be Plain(), SAM(...), FunctionalSAM(...) or LogitSAM(...), got {method!r}")


def check_clip_norm(clip_norm: float | None) -> None:
    """Check the norm that gradients are clipped to.

    Raises:
        UserError: for a number that is not above 0.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm must be > 0, or None for no clipping; got {clip_norm!r}")


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
