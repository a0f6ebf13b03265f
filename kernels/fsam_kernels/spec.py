"""The operations in float64 NumPy, a few lines each: what every backend must compute.

A reader who knows only this file can review every backend. Shapes: N rows (tokens), D features, V vocabulary entries.
Everything is computed in float64 whatever comes in.

    linear_cross_entropy   z = h Wᵀ;  loss_n = logsumexp_v z_nv − z_ny
    logit cotangent        z̄_nv = weight_n (softmax(z_n)_v − [v = y_n]);   Σ_v z̄_nv = 0 on every row
    logit_vjp              h̄ = z̄ W',  W̄ = z̄ᵀ h'        with (h', W') = (h, W) the ordinary backward pass,
                                                          at perturbed weights the functional one
    direction              d = c g,  or  d = c g / (sqrt(v̂) + δ)        c the factor of gradient clipping
    preconditioned_norm    Σ d²  and  Σ (c g) d
    perturb                θ' = θ + scale · d

v̂ is AdamW's bias-corrected second moment. With `current` the gradient at hand is folded in first,

    v_t = β₂ v_{t−1} + (1 − β₂) (c g)²,     v̂ = v_t / (1 − β₂ᵗ),

so that |d_i| ≤ sqrt((1 − β₂ᵗ) / (1 − β₂)); without it v̂ = v_{t−1} / (1 − β₂ᵗ⁻¹), and 0 where t = 1. Folding it in, the
l2 normalisation and δ = AdamW's eps are this project's choices: the paper's own could not be read.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def linear_cross_entropy(
    h_NxD: ArrayLike, w_VxD: ArrayLike, labels_N: ArrayLike, weights_N: ArrayLike | None = None
) -> tuple[F64, F64, F64]:
    """(loss_N, lse_N, z̄_NxV); a row with a negative label is ignored: loss 0 and cotangent 0."""
    h, w, labels = _f64(h_NxD), _f64(w_VxD), np.asarray(labels_N)
    seen = labels >= 0
    weights = np.where(seen, 1.0 if weights_N is None else _f64(weights_N), 0.0)
    rows, y = np.arange(len(labels)), np.where(seen, labels, 0)
    z = h @ w.T
    top = z.max(axis=1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
    zbar = np.exp(z - lse[:, None])
    zbar[rows, y] = 0
    zbar[rows, y] = -zbar.sum(axis=1)  # p_y − 1 = −Σ of the others: no cancellation where p_y → 1
    return np.where(seen, lse - z[rows, y], 0.0), lse, zbar * weights[:, None]


def logit_vjp(zbar_NxV: ArrayLike, h_NxD: ArrayLike, w_VxD: ArrayLike) -> tuple[F64, F64]:
    """(h̄_NxD, w̄_VxD): the cotangent contracted with any head."""
    return _f64(zbar_NxV) @ _f64(w_VxD), _f64(zbar_NxV).T @ _f64(h_NxD)


def clip_factor(g: list[Any], clip_norm: float | None) -> float:
    """min(1, clip_norm / ‖g‖₂) over all tensors; 1 where there is no clipping or no gradient."""
    norm = np.sqrt(sum(np.sum(_f64(x) ** 2) for x in g))
    return 1.0 if clip_norm is None or norm <= clip_norm else float(clip_norm / norm)


def bias_correction(t: int, b2: float, *, current: bool) -> float:
    """1 − β₂ᵗ for the moment that is used at step t = 1, 2, …; 1 for the empty moment of `previous` at t = 1."""
    n = t if current else t - 1
    return 1.0 - b2**n if n > 0 else 1.0


def direction(
    g: ArrayLike,
    v: ArrayLike | None,
    *,
    clip: float = 1.0,
    b2: float = 0.0,
    eps: float = 0.0,
    correction: float = 1.0,
    current: bool = True,
) -> F64:
    """d for one tensor; `v` is the optimizer's second moment before this step, None for d = c g."""
    cg = clip * _f64(g)
    if v is None:
        return cg
    moment = b2 * _f64(v) + (1 - b2) * cg**2 if current else _f64(v)
    return cg / (np.sqrt(moment / correction) + eps)


def preconditioned_norm(g: list[Any], v: list[Any] | None, *, clip: float = 1.0, **adam: Any) -> tuple[float, float]:
    """(Σ d², Σ (c g) d) over all tensors."""
    d = _directions(g, v, clip=clip, **adam)
    sumsq = sum(float(np.sum(x**2)) for x in d)
    return sumsq, sum(float(np.sum(clip * _f64(x) * y)) for x, y in zip(g, d, strict=True))


def scale(rho: float, d_sumsq: float, g_dot_d: float, norm: Literal["l2", "dual"]) -> float:
    """The number that turns d into ε: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d); 0 where the gradient is 0."""
    square = d_sumsq if norm == "l2" else g_dot_d
    return rho / np.sqrt(square) if square > 0 else 0.0


def perturb(theta: list[Any], g: list[Any], v: list[Any] | None, scale: float, **adam: Any) -> list[F64]:
    """θ + scale · d for every tensor."""
    return [_f64(x) + scale * d for x, d in zip(theta, _directions(g, v, **adam), strict=True)]


def _directions(g: list[Any], v: list[Any] | None, **adam: Any) -> list[F64]:
    return [direction(x, m, **adam) for x, m in zip(g, v if v is not None else [None] * len(g), strict=True)]


def _f64(x: ArrayLike) -> F64:
    return np.asarray(x, dtype=np.float64)
