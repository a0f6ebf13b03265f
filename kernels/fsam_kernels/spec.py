"""The contract of every operation: what each backend must compute, in a few lines of float64 NumPy.

A reader who knows only this file can review every backend. Shapes: N rows (tokens), D features, V vocabulary entries.
Everything is computed in float64, whatever the dtype of the inputs.

    logits                 u = h Wᵀ + b;   z = c tanh(u / c) under a soft-cap c, else z = u
    linear_cross_entropy   ℓ_n = (1 − s)(lse_n − z_ny) + s (lse_n − mean_v z_nv) + ζ lse_n²,    lse_n = logsumexp_v z_nv
                           s label smoothing, ζ the factor of the z-loss; plain cross entropy is s = ζ = 0
    logit cotangent        z̄_nv = weight_n ∂ℓ_n/∂z_nv = weight_n ((1 + r_n) p_nv − s/V − (1 − s) [v = y_n]),
                           p = softmax(z), r_n = 2 ζ lse_n;    Σ_v z̄_nv = weight_n r_n, which is 0 without a z-loss
    logit_vjp              ū = z̄ (1 − tanh²(u' / c)),  h̄ = ū W',  W̄ = ūᵀ h',  b̄ = Σ_n ū_n
                           with (h', W', b') = (h, W, b) this is the ordinary backward pass, at perturbed weights the
                           functional one. The tanh is part of the network, so it is taken at the perturbed head;
                           without a cap ū = z̄
    head_curvature         the derivative of logit_vjp along tangents (ḣ, Ẇ, ḃ) of the head, in two summands:
                           u̇ = ḣ Wᵀ + h Ẇᵀ + ḃ,  ż = t u̇,  t = 1 − tanh²(u / c);  ṫ = −(2 / c) tanh(u / c) t u̇
                           Gauss–Newton   q = weight ((1 + r)(p∘ż − p pᵀż) + 2 ζ p pᵀż) t, the Jacobian held:
                                          q W,  qᵀ h,  Σ_n q_n
                           functional     z̄ held:  z̄ṫ W + ū Ẇ,  (z̄ṫ)ᵀ h + ūᵀ ḣ,  Σ_n (z̄ṫ)_n,  ū = z̄ t
                           without a cap t = 1 and ṫ = 0
    reductions             none ℓ;  sum Σ_n weight_n ℓ_n;  mean Σ_n weight_n ℓ_n / Σ_n weight_n;
                           or the sum over a given token count (that of all micro-batches and ranks, say)
    direction              d = c g,  or  d = c g / (sqrt(v̂) + δ)        c the factor of gradient clipping
    preconditioned_norm    Σ d²  and  Σ (c g) d, over all tensors or for each; a masked tensor counts 0
    perturb                θ' = θ + scale · d; scale is one number, or one for each tensor; θ' = θ where masked
    adamw                  m ← β₁ m + (1 − β₁) c g,   v ← β₂ v + (1 − β₂) (c g)²
                           θ ← (1 − η λ) θ − η m̂ / (sqrt(v̂) + ε),   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ)
                           η the learning rate, λ the weight decay (decoupled), t = 1, 2, … the number of this step
    random rounding        of float32 bits b to bfloat16: the upper half of b + u, u 16 random bits; a NaN stays NaN

A row whose label is negative, or equal to `ignore_index`, is ignored: its loss, weight and cotangent are 0. At the
target the cotangent is (1 + r)(p_y − 1) + r + s − s/V. p_y − 1 is computed as minus the sum of the other columns: where
p_y → 1 the subtraction would cancel all digits, and so would expm1(z_y − lse), because lse is itself rounded.

v̂ is AdamW's bias-corrected second moment. With `current` this step's gradient is folded in first,

    v_t = β₂ v_{t−1} + (1 − β₂) (c g)²,     v̂ = v_t / (1 − β₂ᵗ),

so that |d_i| ≤ sqrt((1 − β₂ᵗ) / (1 − β₂)); otherwise v̂ = v_{t−1} / (1 − β₂ᵗ⁻¹), and 0 at t = 1. Folding the gradient
in, the l2 normalisation and δ = AdamW's eps are this project's choices, because the paper's own could not be read.
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
    """(h̄_NxD, w̄_VxD, b̄_V): the vjp of any head with this cotangent."""
    ubar = _f64(zbar_NxV)
    if soft_cap is not None:
        ubar = ubar * (1 - np.tanh(logits(h_NxD, w_VxD, bias_V) / soft_cap) ** 2)
    return ubar @ _f64(w_VxD), ubar.T @ _f64(h_NxD), ubar.sum(axis=0)


def head_curvature(
    h_NxD: ArrayLike,
    w_VxD: ArrayLike,
    labels_N: ArrayLike,
    weights_N: ArrayLike,
    hdot_NxD: ArrayLike,
    wdot_VxD: ArrayLike,
    *,
    bias_V: ArrayLike | None = None,
    bias_dot_V: ArrayLike | None = None,
    loss: Loss = CROSS_ENTROPY,
) -> tuple[tuple[F64, F64, F64], tuple[F64, F64, F64]]:
    """The Gauss–Newton and the functional summand of (h̄_NxD, w̄_VxD, b̄_V)'s derivative along these tangents."""
    h, w, hdot, wdot = map(_f64, (h_NxD, w_VxD, hdot_NxD, wdot_VxD))
    zbar = linear_cross_entropy(h, w, labels_N, weights_N, bias_V=bias_V, loss=loss)[2]
    weights = np.where(np.asarray(labels_N) >= 0, _f64(weights_N), 0.0)[:, None]
    udot, u = hdot @ w.T + h @ wdot.T, logits(h, w, bias_V)
    if bias_dot_V is not None:
        udot = udot + _f64(bias_dot_V)
    z, t, tdot = u, np.ones_like(u), np.zeros_like(u)
    if loss.soft_cap is not None:
        z, tanh = capped(u, loss.soft_cap), np.tanh(u / loss.soft_cap)
        t = 1 - tanh**2
        tdot = -2 / loss.soft_cap * tanh * t * udot
    zdot, top = t * udot, z.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(axis=1, keepdims=True))
    p, r = np.exp(z - lse), 2 * loss.z_loss * lse
    # p∘ż − p pᵀż is the same for ż − ż_top, and loses no digits where p_top → 1.
    shift = np.take_along_axis(zdot, z.argmax(axis=1)[:, None], axis=1)
    mean = np.sum(p * (zdot - shift), axis=1, keepdims=True)
    q = weights * ((1 + r) * p * (zdot - shift - mean) + 2 * loss.z_loss * p * (mean + shift)) * t
    held, moved = zbar * t, zbar * tdot
    gauss_newton = q @ w, q.T @ h, q.sum(axis=0)
    return gauss_newton, (moved @ w + held @ wdot, moved.T @ h + held.T @ hdot, moved.sum(axis=0))


def logits(h_NxD: ArrayLike, w_VxD: ArrayLike, bias_V: ArrayLike | None = None) -> F64:
    """u = h Wᵀ + b."""
    u = _f64(h_NxD) @ _f64(w_VxD).T
    return u if bias_V is None else u + _f64(bias_V)


def capped(u_NxV: F64, soft_cap: float | None) -> F64:
    """z = c tanh(u / c)."""
    return u_NxV if soft_cap is None else soft_cap * np.tanh(u_NxV / soft_cap)


def reduce(loss_N: F64, weights_N: ArrayLike, reduction: Literal["none", "sum", "mean"], count: float | None = None):
    """The loss as `cross_entropy` returns it; `weights_N` is 0 on ignored rows. The mean of no rows is 0."""
    weights = _f64(weights_N)
    if reduction == "none":
        return loss_N
    total = float(np.sum(loss_N * weights))
    if reduction == "sum":
        return total
    divisor = float(np.sum(weights)) if count is None else count
    return total / divisor if divisor > 0 else 0.0


def clip_factor(g: list[Any], clip_norm: float | None) -> float:
    """min(1, clip_norm / ‖g‖₂) over all tensors; 1 without clipping or with a zero gradient."""
    norm = np.sqrt(sum(np.sum(_f64(x) ** 2) for x in g))
    return 1.0 if clip_norm is None or norm <= clip_norm else float(clip_norm / norm)


def bias_correction(t: int, b2: float, *, current: bool) -> float:
    """1 − β₂ᵗ of the moment used at step t = 1, 2, …; 1 for the zero moment of `previous` at t = 1."""
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
    """d of one tensor; `v` is the optimizer's second moment before this step, None for d = c g."""
    cg = clip * _f64(g)
    if v is None:
        return cg
    moment = b2 * _f64(v) + (1 - b2) * cg**2 if current else _f64(v)
    return cg / (np.sqrt(moment / correction) + eps)


def preconditioned_norm(
    g: list[Any],
    v: list[Any] | None,
    *,
    clip: float = 1.0,
    mask: list[bool] | None = None,
    per_tensor: bool = False,
    **adam: Any,
) -> tuple[Any, Any]:
    """(Σ d², Σ (c g) d) over all tensors, or for each with `per_tensor`; 0 for a tensor whose mask is False."""
    d = _masked(_directions(g, v, clip=clip, **adam), mask)
    sumsq = np.array([np.sum(x**2) for x in d])
    dot = np.array([np.sum(clip * _f64(x) * y) for x, y in zip(g, d, strict=True)])
    return (sumsq, dot) if per_tensor else (float(sumsq.sum()), float(dot.sum()))


def scale(rho: float, d_sumsq: Any, g_dot_d: Any, norm: Literal["l2", "dual"]) -> Any:
    """The factor of d in ε: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d); 0 where the gradient is 0.

    Sums per tensor give one factor per tensor, so that every tensor's ε has length ρ.
    """
    square = _f64(d_sumsq if norm == "l2" else g_dot_d)
    found = np.where(square > 0, rho / np.sqrt(np.where(square > 0, square, 1.0)), 0.0)
    return found if found.ndim else float(found)


def perturb(
    theta: list[Any], g: list[Any], v: list[Any] | None, scale: Any, *, mask: list[bool] | None = None, **adam: Any
) -> list[F64]:
    """θ + scale · d for every tensor; θ where its mask is False."""
    d = _masked(_directions(g, v, **adam), mask)
    each = np.broadcast_to(_f64(scale), len(theta))
    return [_f64(x) + s * y for x, s, y in zip(theta, each, d, strict=True)]


def adamw(
    theta: ArrayLike,
    g: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    *,
    step: int,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> tuple[F64, F64, F64]:
    """(θ, m, v) of one tensor after step `step` = 1, 2, …"""
    cg = clip * _f64(g)
    m = b1 * _f64(m) + (1 - b1) * cg
    v = b2 * _f64(v) + (1 - b2) * cg**2
    moved = lr * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
    return (1 - lr * weight_decay) * _f64(theta) - moved, m, v


# Arrays that are written at the same time draw from different streams.
STREAMS = {"theta": 0, "exp_avg": 1, "exp_avg_sq": 2, "copy": 3}


def random_bits(n: int, *, seed: int, step: int, tensor: int, stream: str = "theta") -> NDArray[np.uint32]:
    """16 random bits for each of n elements: the low, then the high half of a 32-bit hash of half the position.

    The hash has two keys. SplitMix64's finaliser, chained over seed, step, tensor and stream, gives them.
    """
    x, full = np.uint64(0), 2**64
    with np.errstate(over="ignore"):
        for word in (seed, step, tensor, STREAMS[stream]):
            x += np.uint64((word + 0x9E3779B97F4A7C15) % full)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
        words = (np.arange((n + 1) // 2) % 2**32).astype(np.uint32) ^ np.uint32(int(x) % 2**32)
        words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        words = (words ^ (words >> np.uint32(13)) ^ np.uint32(int(x) >> 32)) * np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=1).ravel()[:n]


def rounded_at_random(x: ArrayLike, **draw: Any) -> NDArray[np.float32]:
    """float32 values rounded to bfloat16, returned in float32; `draw` as in `random_bits`. The mean error is 0."""
    x = np.asarray(x, dtype=np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32).ravel() + random_bits(x.size, **draw)
    rounded = (bits & np.uint32(0xFFFF0000)).view(np.float32).reshape(x.shape)
    return np.where(np.isnan(x), x, rounded)


def _masked(d: list[F64], mask: list[bool] | None) -> list[F64]:
    return d if mask is None else [x if moves else np.zeros_like(x) for x, moves in zip(d, mask, strict=True)]


def _directions(g: list[Any], v: list[Any] | None, **adam: Any) -> list[F64]:
    return [direction(x, m, **adam) for x, m in zip(g, v if v is not None else [None] * len(g), strict=True)]


def _f64(x: ArrayLike) -> F64:
    return np.asarray(x, dtype=np.float64)
