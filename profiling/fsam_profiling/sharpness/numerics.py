"""Eigenvalues, trace and spectral density of a symmetric matrix that is known by its products alone.

No library has these for both frameworks, so the iteration is here, in NumPy on a function v[n] -> A v[n]. Golub and Van
Loan, Matrix Computations, 10.1 (Lanczos); Meyer et al., arXiv 2010.09649 (Hutch++); Ghorbani et al., arXiv 1901.10159
(densities).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Product = Callable[[Array], Array]
TOLERANCE = 1e-4
"""Of an eigenvalue's residual, relative to the largest eigenvalue."""


class Ritz(NamedTuple):
    """Approximate eigenvalues in ascending order, from m products.

    Attributes:
        values: [m].
        residuals: [m] ‖A x − λ x‖ of each, which bounds its distance from an eigenvalue.
        coordinates: [m, m] eigenvectors in the basis, a column each.
        basis: [m, n] orthonormal rows.
    """

    values: Array
    residuals: Array
    coordinates: Array
    basis: Array

    def vector(self, i: int) -> Array:
        """The i-th eigenvector, [n]."""
        return self.coordinates[:, i] @ self.basis


class Extremes(NamedTuple):
    """The largest eigenvalues, the largest first, the smallest one, and whether their residuals are within tolerance.

    Attributes:
        vectors: of the two largest, [n] each.
        products: how many were needed.
    """

    largest: list[float]
    smallest: float
    residuals: list[float]
    converged: bool
    vectors: list[Array]
    products: int


class Estimate(NamedTuple):
    """A trace and its standard error."""

    value: float
    error: float


def lanczos(product: Product, start: Array, random: np.random.Generator, most: int) -> Iterator[Ritz]:
    """Ritz pairs after 1, 2, … products, at most `most` or n, with full reorthogonalisation.

    An invariant subspace is left by a new random direction, so that eigenvalues of any multiplicity are found.
    """
    n = len(start)
    basis = np.zeros((min(most, n), n), start.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    q = start / np.linalg.norm(start)
    for m in range(len(basis)):
        basis[m] = q
        # A copy, because it is changed and may be the caller's own.
        r = np.array(product(q), start.dtype)
        diagonal.append(float(q @ r))
        r, beta = _orthogonal(r, basis[: m + 1])
        scale = max(map(abs, [*diagonal, *beside]))
        # Times √n it was larger than what is asked for from 7,000 weights on, and β of a real matrix may be below it.
        spans_all = beta <= 10 * np.finfo(start.dtype).eps * scale
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        residuals = np.abs(vectors[-1]) * beta
        yield Ritz(values, residuals, vectors, basis[: m + 1])
        if spans_all and m + 1 < n:
            r, beta = _orthogonal(random.standard_normal(n).astype(start.dtype), basis[: m + 1])
        beside.append(0.0 if spans_all else beta)
        q = r / (beta or 1.0)


def _orthogonal(r: Array, basis: Array) -> tuple[Array, float]:
    """(r without its components along the basis, its length); twice, because once leaves rounding."""
    for _ in range(2):
        r = r - (basis @ r) @ basis
    return r, float(np.linalg.norm(r))


def extremes(
    product: Product,
    n: int,
    count: int,
    random: np.random.Generator,
    *,
    most: int = 100,
    tolerance: float = TOLERANCE,
    dtype: Any = np.float64,
) -> Extremes:
    """The `count` largest eigenvalues of A[n, n] and the smallest, by products until the residuals are small."""
    found: Ritz | None = None
    converged = False
    for found in lanczos(product, random.standard_normal(n).astype(dtype), random, most):
        wanted = _wanted(found, count)
        bound = tolerance * max(abs(found.values[0]), abs(found.values[-1]))
        # A whole subspace that only the start spans may converge before the largest values appear.
        enough = len(found.values) >= min(n, 2 * count + 4)
        if converged := bool(enough and (found.residuals[wanted] <= bound).all()):
            break
    assert found is not None
    top = _wanted(found, count)[1:]
    residuals = [float(found.residuals[i]) for i in (*top, 0)]
    largest = [float(found.values[i]) for i in top]
    vectors = [found.vector(i) for i in top[:2]]
    return Extremes(largest, float(found.values[0]), residuals, converged, vectors, len(found.values))


def _wanted(found: Ritz, count: int) -> list[int]:
    """The indices of the smallest value and of the largest ones, the largest first."""
    last = len(found.values) - 1
    return [0, *range(last, max(last - count, -1), -1)]


def trace(product: Product, n: int, products: int, random: np.random.Generator, dtype: Any = np.float64) -> Estimate:
    """Hutch++: a third of the products finds a subspace, a third is its exact trace, a third estimates the rest.

    The error is that of the last third's mean; the estimate is exact, with error 0, where the subspace is everything.
    """
    third = max(2, products // 3)
    signs = lambda: random.choice([-1.0, 1.0], n).astype(dtype)
    sketch_nxk = np.stack([np.array(product(signs())) for _ in range(min(third, n))], axis=1)
    q_nxk, _ = np.linalg.qr(sketch_nxk)
    inside = sum(float(q @ product(np.ascontiguousarray(q))) for q in q_nxk.T)
    if q_nxk.shape[1] == n:
        return Estimate(inside, 0.0)
    rest = []
    for _ in range(third):
        g = signs()
        g = (g - q_nxk @ (q_nxk.T @ g)).astype(dtype)
        rest.append(float(g @ product(g)))
    return Estimate(inside + float(np.mean(rest)), float(np.std(rest, ddof=1) / np.sqrt(third)))


def density(
    product: Product, n: int, random: np.random.Generator, *, probes: int = 4, steps: int = 30, dtype: Any = np.float64
) -> tuple[Array, Array]:
    """(points, weights) whose weighted sum of f is about the mean of f over all eigenvalues; the weights sum to 1.

    Stochastic Lanczos quadrature: the Ritz values of a random start, weighted by the squares of its components.
    """
    points, weights = [], []
    for _ in range(probes):
        *_, found = lanczos(product, random.standard_normal(n).astype(dtype), random, steps)
        points.append(found.values)
        weights.append(found.coordinates[0] ** 2 / probes)
    return np.concatenate(points), np.concatenate(weights)
