"""The figures of `fsam sharpness`, as rows of plain values that JSON, table and report share.

Every row has `what`, `run`, `step` and `method`. By `what`:

    shares    direction, radius (0: the products; ρ: secants as the methods see them), the fields of `Shares`,
              loss, gradient_norm
    spectrum  matrix (H, G), eigenvalues (the largest first), smallest, residuals, converged, products
    trace     matrix, trace, error (standard error), products
    density   matrix, values and weights (which sum to 1)
    line      direction, distances, losses: the loss along ± d / ‖d‖
    plane     distances, losses: [a, b] at a times the first and b times the second eigenvector of H
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fsam_core import UserError
from fsam_core.curvature import shares
from fsam_profiling.sharpness import numerics
from fsam_profiling.sharpness.subjects import Subject, adam_direction, as_tree

Row = dict[str, Any]
Tick = Callable[[], None]
POINTS = {"1d": 21, "2d": 11}
PROBES, DENSITY_STEPS = 4, 30


@dataclass(frozen=True)
class Wanted:
    """What is measured: the shares at every checkpoint, the rest at the last of each run.

    Attributes:
        directions: of "gradient" and "adam"; the second is left out where there is no training state.
        rho: the radius of the secants and of the landscape; None for the run's own, or 0.5.
        eigenvalues: how many of the largest; 0 for none.
        trace: products for each trace; 0 for none.
        most: products for the eigenvalues of each matrix, at most.
    """

    directions: tuple[str, ...] = ("gradient", "adam")
    rho: float | None = None
    eigenvalues: int = 0
    trace: int = 0
    density: bool = False
    landscape: Literal["none", "1d", "2d"] = "none"
    most: int = 100
    seed: int = 0

    def pieces(self, at_the_end: bool) -> int:
        """The pieces of work at a checkpoint: each is one product or one loss, about."""
        count = 5 * len(self.directions)
        if not at_the_end:
            return count
        count += 2 * (self.trace + self.density * PROBES * DENSITY_STEPS)
        count += self.most * (2 if self.eigenvalues else self.landscape == "2d")
        return count + {"none": 0, "1d": POINTS["1d"] * len(self.directions), "2d": POINTS["2d"] ** 2}[self.landscape]


def measure(subject: Subject, curvature: Any, wanted: Wanted, at_the_end: bool, tick: Tick) -> Iterator[Row]:
    """The rows of one checkpoint, each as soon as it is there.

    Raises:
        UserError: for a gradient of 0, or products that are not finite.
    """
    rho = wanted.rho or (subject.moments.settings.rho if subject.moments else 0.5)
    directions = _directions(subject, curvature, wanted.directions)
    head = {"run": subject.run, "step": subject.step, "method": subject.method}
    for name, d in directions.items():
        for row in _shares(curvature, name, d, rho, tick):
            yield {"what": "shares", **head, **row}
    if not at_the_end:
        return
    random = np.random.default_rng(wanted.seed)
    n, dtype = curvature.size, curvature.vector(curvature.gradient).dtype
    products = {"H": _counted(curvature, "hessian", tick), "G": _counted(curvature, "gauss_newton", tick)}
    vectors: list[np.ndarray] = []
    for matrix, product in products.items():
        if wanted.eigenvalues or (matrix == "H" and wanted.landscape == "2d"):
            count = max(2, wanted.eigenvalues)
            found = numerics.extremes(product, n, count, random, most=wanted.most, dtype=dtype)
            for _ in range(wanted.most - found.products):
                tick()
            vectors = vectors or found.vectors
            yield {
                "what": "spectrum",
                **head,
                "matrix": matrix,
                "eigenvalues": found.largest,
                "smallest": found.smallest,
                "residuals": found.residuals,
                "converged": found.converged,
                "products": found.products,
            }
        if wanted.trace:
            estimate = numerics.trace(product, n, wanted.trace, random, dtype=dtype)
            figures = {"trace": estimate.value, "error": estimate.error, "products": wanted.trace}
            yield {"what": "trace", **head, "matrix": matrix, **figures}
        if wanted.density:
            values, weights = numerics.density(product, n, random, probes=PROBES, steps=DENSITY_STEPS, dtype=dtype)
            yield {"what": "density", **head, "matrix": matrix, "values": values.tolist(), "weights": weights.tolist()}

    def loss_at(v: np.ndarray) -> float:
        tick()
        return curvature.loss_at(curvature.tree(v.astype(dtype)))

    if wanted.landscape == "1d":
        distances = np.linspace(-2 * rho, 2 * rho, POINTS["1d"])
        for name, d in directions.items():
            losses = [loss_at(r * d / np.linalg.norm(d)) for r in distances]
            yield {"what": "line", **head, "direction": name, "distances": distances.tolist(), "losses": losses}
    if wanted.landscape == "2d":
        distances = np.linspace(-rho, rho, POINTS["2d"])
        first, second = vectors
        grid = [[loss_at(a * first + b * second) for b in distances] for a in distances]
        yield {"what": "plane", **head, "distances": distances.tolist(), "losses": grid}


def _directions(subject: Subject, curvature: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    gradient = curvature.vector(curvature.gradient)
    if not np.any(gradient):
        raise UserError(f"RUNS: the gradient of {subject.label} is 0, so it has no direction of ascent")
    found = {"gradient": gradient}
    if subject.moments is not None:
        second = curvature.vector(as_tree(subject, subject.moments.second))
        found["adam"] = adam_direction(subject.moments, gradient, second).astype(gradient.dtype)
    chosen = {name: found[name] for name in names if name in found}
    if not chosen:
        raise UserError(f"--directions: adam needs the moments of a run's checkpoint; {subject.label} has none")
    return chosen


def _shares(curvature: Any, name: str, d: np.ndarray, rho: float, tick: Tick) -> Iterator[Row]:
    tree = curvature.tree(d)
    common = {"loss": curvature.loss, "gradient_norm": float(np.linalg.norm(curvature.vector(curvature.gradient)))}
    g_d, n_d = map(curvature.vector, curvature.both(tree))
    for _ in range(2):
        tick()
    yield {"direction": name, "radius": 0.0, **shares(d, g_d, n_d)._asdict(), **common}
    h_d, g_d, n_d = map(curvature.vector, curvature.secants(tree, rho))
    for _ in range(3):
        tick()
    yield {"direction": name, "radius": rho, **shares(d, g_d, n_d, h_d)._asdict(), **common}


def _counted(curvature: Any, name: str, tick: Tick) -> numerics.Product:
    def product(v: np.ndarray) -> np.ndarray:
        tick()
        return curvature.vector(getattr(curvature, name)(curvature.tree(v)))

    return product
