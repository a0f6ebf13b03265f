"""What the curvature modules of both frameworks share: how products are computed, and the shares of H d."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fsam_core.errors import UserError
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM

Products = Literal["exact", "difference"]
RADIUS = 1e-3
"""Of the central differences in float32: larger ones see the third derivative, smaller ones rounding."""


PATHS: dict[str, Any] = {"hessian": SAM, "gauss_newton": LogitSAM, "functional": FunctionalSAM}
"""The methods whose gradients at θ + ε differ from the plain one by H ε, G ε and N ε to first order."""


class Operators(ABC):
    """What the `Curvature` of both frameworks has: products with H, G and N, exact or from gradients.

    Vectors are trees like the parameters.

    Attributes:
        gradient: that of the mean loss.
    """

    products: Products
    radius: float
    gradient: Any

    def hessian(self, v: Any) -> Any:
        """H v."""
        return self._product("hessian", v)

    def gauss_newton(self, v: Any) -> Any:
        """G v."""
        return self._product("gauss_newton", v)

    def functional(self, v: Any) -> Any:
        """N v."""
        return self._product("functional", v)

    def both(self, v: Any) -> tuple[Any, Any]:
        """(G v, N v) for less than the two by themselves."""
        if self.products == "exact":
            return self._exact("both", v)
        return self.gauss_newton(v), self.functional(v)

    def secants(self, d: Any, rho: float) -> tuple[Any, Any, Any]:
        """(H, G, N) applied to d, as a method sees them at radius ρ: (g' − g) ‖d‖ / ρ at θ + ρ d / ‖d‖.

        H is the difference of SAM's gradient, G of the logit method's, N of the functional one's. Their limits for
        ρ → 0 are the products with H, G and N; at finite ρ G and N do not add up to H.
        """
        factor = self._length(d) / rho
        difference = lambda moved: self._map(lambda x, g: (x - g) * factor, moved, self.gradient)
        of_H, of_G, of_N = (difference(self._moved(which, d, rho)) for which in PATHS)
        return of_H, of_G, of_N

    def _product(self, which: str, v: Any) -> Any:
        if self.products == "exact":
            return self._exact(which, v)
        scale = self._length(v) / (2 * self.radius)
        ahead, behind = (self._moved(which, x, self.radius) for x in (v, self._map(lambda x: -x, v)))
        return self._map(lambda a, b: (a - b) * scale, ahead, behind)

    @abstractmethod
    def _exact(self, which: str, v: Any) -> Any:
        """H v, G v, N v, or of "both" (G v, N v)."""

    @abstractmethod
    def _moved(self, which: str, v: Any, rho: float) -> Any:
        """The gradient of a method of `PATHS` whose perturbation is ρ v / ‖v‖."""

    @abstractmethod
    def _length(self, v: Any) -> float:
        """‖v‖"""

    @staticmethod
    @abstractmethod
    def _map(function: Callable[..., Any], *trees: Any) -> Any:
        """A function of the arrays of the same names."""


class Shares(NamedTuple):
    """How H d = G d + N d divides into the part through the logits and the part through the function.

    Dividing by ‖H d‖² is this project's choice. `gauss_newton` + `functional` + `cross` = 1, and the first two may
    exceed 1 where G d and N d point against each other.

    Attributes:
        gauss_newton, functional: ‖G d‖² / ‖H d‖² and ‖N d‖² / ‖H d‖².
        cross: 2 ⟨G d, N d⟩ / ‖H d‖²; of secants also what G d + N d lack of H d.
        cosine: of G d and N d.
        d_G_d, d_N_d: dᵀG d and dᵀN d for d of length 1, the curvature along d.
        norm: ‖H d‖ for d of length 1.
    """

    gauss_newton: float
    functional: float
    cross: float
    cosine: float
    d_G_d: float
    d_N_d: float
    norm: float


def shares(d: NDArray[Any], g_d: NDArray[Any], n_d: NDArray[Any], h_d: NDArray[Any] | None = None) -> Shares:
    """The shares from a direction d[P], G d[P] and N d[P]; H d[P] is their sum unless it is given.

    Raises:
        UserError: for d = 0, and products that are not finite.
    """
    d, g_d, n_d = (np.asarray(x, np.float64) for x in (d, g_d, n_d))
    h_d = g_d + n_d if h_d is None else np.asarray(h_d, np.float64)
    length = math.sqrt(d @ d)
    if length == 0:
        raise UserError("direction: it is 0 (the gradient of a converged model, say), so there is no share along it")
    gg, nn, hh = float(g_d @ g_d), float(n_d @ n_d), float(h_d @ h_d)
    if not math.isfinite(gg + nn + hh):
        raise UserError("curvature: H d is not finite; compute in float64, or at weights that have not diverged")
    by = lambda x, y: x / y if y else 0.0
    part, other = by(gg, hh), by(nn, hh)
    cosine = by(float(g_d @ n_d), math.sqrt(gg) * math.sqrt(nn))
    along = float(d @ g_d) / length**2, float(d @ n_d) / length**2
    return Shares(part, other, 1 - part - other if hh else 0.0, cosine, *along, math.sqrt(hh) / length)


def check_products(products: str, radius: float) -> None:
    """Check the arguments of a Curvature.

    Raises:
        UserError: naming the argument.
    """
    if products not in get_args(Products):
        raise UserError(f"products must be 'exact' or 'difference', got {products!r}")
    if not 0 < radius < math.inf:
        raise UserError(f"radius must be a finite number > 0, got {radius!r}")


def check_weight(weight: float) -> None:
    """Check that some token counts.

    Raises:
        UserError: where none does.
    """
    if not weight > 0:
        raise UserError("batch: no token has a label and a weight, so the loss is 0; give labels that are >= 0")


def check_not_quantised(names_and_dtypes: list[tuple[str, str]]) -> None:
    """Check that no weight is stored in integers of 8 bits or fewer.

    Raises:
        UserError: naming the first that is.
    """
    for name, dtype in names_and_dtypes:
        if dtype.removeprefix("torch.") in ("int8", "uint8", "int4", "uint4", "int2", "uint2"):
            raise UserError(
                f"params: {name} is {dtype}, a quantised weight, which has no derivative; load the model in float32"
            )


NO_SECOND_DERIVATIVE = (
    "products: the model has an operation without a second derivative ({}); use its plain form "
    "(attn_implementation='eager' in transformers), or products='difference'"
)
