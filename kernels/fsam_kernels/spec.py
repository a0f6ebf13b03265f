"""The operations in float64 NumPy, a few lines each: what every backend must compute.

A reader who knows only this file can review every backend. Shapes: N rows (tokens), D features, V vocabulary entries.
Everything is computed in float64 whatever comes in.

    logits                 u = h Wᵀ + b;   z = c tanh(u / c) under a soft-cap c, else z = u
    linear_cross_entropy   ℓ_n = (1 − s)(lse_n − z_ny) + s (lse_n − mean_v z_nv) + ζ lse_n²,    lse_n = logsumexp_v z_nv
                           s label smoothing, ζ the factor of the z-loss; plain cross entropy is s = ζ = 0
    logit cotangent        z̄_nv = weight_n ∂ℓ_n/∂z_nv = weight_n ((1 + r_n) p_nv − s/V − (1 − s) [v = y_n]),
                           p = softmax(z), r_n = 2 ζ lse_n;    Σ_v z̄_nv = weight_n r_n, which is 0 without a z-loss
    logit_vjp              ū = z̄ (1 − tanh²(u' / c)),  h̄ = ū W',  W̄ = ūᵀ h',  b̄ = Σ_n ū_n
                           with (h', W', b') = (h, W, b) the ordinary backward pass, at perturbed weights the functional
                           one. The tanh belongs to the network, so it moves with the head; without a cap ū = z̄
    reductions             none ℓ;  sum Σ_n weight_n ℓ_n;  mean Σ_n weight_n ℓ_n / Σ_n weight_n;
                           or the sum over a token count that is given (of all micro-batches and ranks, say)
    direction              d = c g,  or  d = c g / (sqrt(v̂) + δ)        c the factor of gradient clipping
    preconditioned_norm    Σ d²  and  Σ (c g) d
    perturb                θ' = θ + scale · d

A row whose label is negative, or equal to `ignore_index`, counts for nothing: its loss, weight and cotangent are 0.
At the target the cotangent is (1 + r)(p_y − 1) + r + s − s/V, and p_y − 1 is formed as minus the sum of the other
columns: where p_y → 1 a subtraction would leave no digits, and expm1(z_y − lse) leaves none either, because lse is
itself rounded.

v̂ is AdamW's bias-corrected second moment. With `current` the gradient at hand is folded in first,

    v_t = β₂ v_{t−1} + (1 − β₂) (c g)²,     v̂ = v_t / (1 − β₂ᵗ),

so that |d_i| ≤ sqrt((1 − β₂ᵗ) / (1 − β₂)); without it v̂ = v_{t−1} / (1 − β₂ᵗ⁻¹), and 0 where t = 1. Folding it in, the
l2 normalisation and δ = AdamW's eps are this project's choices: the paper's own could not be read.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fsam_kernels.options import CROSS_ENTROPY, Loss

F64 = NDArray[np.float64]


def linear_cross_entropy(
    h_NxD: ArrayLike,
    w_VxD: ArrayLike,
    labels_N: ArrayLike,
    weights_N: ArrayLike | None = None,
    *,
    bias_V: ArrayLike | None = None,
    loss: Loss = CROSS_ENTROPY,
    ignore_index: int | None = None,
) -> tuple[F64, F64, F64]:
    """(loss_N, lse_N, z̄_NxV), the cotangent of Σ_n weight_n loss_n at the capped logits z."""
    labels = np.asarray(labels_N)
    seen = labels >= 0
    if ignore_index is not None:
        seen &= labels != ignore_index
    weights = np.where(seen, 1.0 if weights_N is None else _f64(weights_N), 0.0)
    z = capped(logits(h_NxD, w_VxD, bias_V), loss.soft_cap)
    V = z.shape[1]
    rows, y = np.arange(len(labels)), np.where(seen, labels, 0)
    s, top = loss.label_smoothing, z.max(axis=1)
    e = np.exp(z - top[:, None])
    lse = top + np.log(e.sum(axis=1))
    p = np.exp(z - lse[:, None])
    p[rows, y] = 0
    miss = p.sum(axis=1)  # 1 − p_y, with no cancellation where p_y → 1
    each = (1 - s) * (lse - z[rows, y]) + s * (lse - z.mean(axis=1)) + loss.z_loss * lse**2
    r = 2 * loss.z_loss * lse
    zbar = (1 + r)[:, None] * p - loss.floor(V)
    zbar[rows, y] = -(1 + r) * miss + r + s - loss.floor(V)
    return np.where(seen, each, 0.0), lse, zbar * weights[:, None]


def logit_vjp(
    zbar_NxV: ArrayLike,
    h_NxD: ArrayLike,
    w_VxD: ArrayLike,
    *,
    bias_V: ArrayLike | None = None,
    soft_cap: float | None = None,
) -> tuple[F64, F64, F64]:
    """(h̄_NxD, w̄_VxD, b̄_V): the cotangent pulled back through any head."""
    ubar = _f64(zbar_NxV)
    if soft_cap is not None:
        ubar = ubar * (1 - np.tanh(logits(h_NxD, w_VxD, bias_V) / soft_cap) ** 2)
    return ubar @ _f64(w_VxD), ubar.T @ _f64(h_NxD), ubar.sum(axis=0)


def logits(h_NxD: ArrayLike, w_VxD: ArrayLike, bias_V: ArrayLike | None = None) -> F64:
    """u = h Wᵀ + b."""
    u = _f64(h_NxD) @ _f64(w_VxD).T
    return u if bias_V is None else u + _f64(bias_V)


def capped(u_NxV: F64, soft_cap: float | None) -> F64:
    """z = c tanh(u / c)."""
    return u_NxV if soft_cap is None else soft_cap * np.tanh(u_NxV / soft_cap)


def reduce(loss_N: F64, weights_N: ArrayLike, reduction: Literal["none", "sum", "mean"], count: float | None = None):
    """The loss as `cross_entropy` returns it; `weights_N` are 0 where rows are ignored. A mean of nothing is 0."""
    weights = _f64(weights_N)
    if reduction == "none":
        return loss_N
    total = float(np.sum(loss_N * weights))
    if reduction == "sum":
        return total
    divisor = float(np.sum(weights)) if count is None else count
    return total / divisor if divisor > 0 else 0.0


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
