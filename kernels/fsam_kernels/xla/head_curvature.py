"""A linear head's gradient, and its derivative along a tangent of the head, in the two summands of H = G + N."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.xla import chunks
from fsam_kernels.xla import softmax_stats as plain
from fsam_kernels.xla.linear_cross_entropy import HeadGradients, Sums
from fsam_kernels.xla.softmax_stats import accum_dtype

ARRAYS = 6  # of a chunk's logits' shape that exist at the same time


class HeadCurvature(NamedTuple):
    """The gradient at the head, and the Gauss–Newton and the functional summand of its derivative."""

    gradient: HeadGradients
    gauss_newton: HeadGradients
    functional: HeadGradients


def head_curvature(
    h_NxD: jax.Array,
    w_VxD: jax.Array,
    labels_N: jax.Array,
    weights_N: jax.Array,
    hdot_NxD: jax.Array,
    wdot_VxD: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    bias_dot_V: jax.Array | None = None,
    loss: Loss = CROSS_ENTROPY,
    chunk_bytes: int | None = None,
    row_axes: tuple[str, ...] = (),
) -> HeadCurvature:
    """`spec.head_curvature`, and the gradient, whose logits are the same: nine matrix products, no N×V array.

    With a soft-cap it is eleven, because the derivative of the tanh has a tangent of its own.

    Args:
        h_NxD, w_VxD, labels_N, weights_N, bias_V, loss: as in `linear_cross_entropy`.
        hdot_NxD, wdot_VxD, bias_dot_V: tangents with the shapes of h, W and b; the last if and only if there is a bias.
        chunk_bytes: rows are processed in chunks whose ARRAYS arrays fill about this much; None as there.
        row_axes: as there.

    Returns:
        h̄, w̄ and b̄ of each in the dtypes of h, w and b; w̄ and b̄ are summed over chunks in float32 or float64.
    """
    N, V, dtype = len(h_NxD), len(w_VxD), h_NxD.dtype
    weights_N = jnp.where(labels_N >= 0, weights_N, 0).astype(accum_dtype(h_NxD))
    m = chunks.count(N // chunks.shards(row_axes), ARRAYS * V * weights_N.dtype.itemsize, chunk_bytes)
    sums_of = lambda h, w, bias: Sums(h, w, bias, weights_N, False, chunks.summing(N, m, row_axes))
    at_head, at_tangent = sums_of(h_NxD, w_VxD, bias_V), sums_of(hdot_NxD, wdot_VxD, None)

    def one(total: Any, chunk: Any) -> Any:
        h_CxD, hdot_CxD, labels_C, weights_C = chunk
        rows, u_CxV = plain.forward(h_CxD, w_VxD, bias_V, labels_C, loss, tiles=True)
        udot_CxV = plain.logits(hdot_CxD, w_VxD, bias_dot_V) + plain.logits(h_CxD, wdot_VxD)
        p_CxV = plain.operand(u_CxV, rows, labels_C, loss, u_CxV.dtype)
        through = partial(plain.through_cap, u_CxV=u_CxV, loss=loss)
        q_CxV = through(_gauss_newton(plain.capped(u_CxV, loss), through(udot_CxV), rows.lse_C, loss))
        p_CxV = through(p_CxV)
        operands = [(at_head, p_CxV, h_CxD), (at_head, q_CxV, h_CxD), (at_tangent, p_CxV, hdot_CxD)]
        if loss.soft_cap is not None:
            moved_CxV = p_CxV * udot_CxV * jnp.tanh(u_CxV / loss.soft_cap) * (-2 / loss.soft_cap)
            operands.append((at_head, moved_CxV, h_CxD))
        found = [
            sums.add(so_far, x_CxV.astype(dtype), None, at_CxD, weights_C)
            for so_far, (sums, x_CxV, at_CxD) in zip(total, operands, strict=True)
        ]
        totals, hbars = zip(*found, strict=True)
        return totals, hbars

    split, join = partial(chunks.split, m=m), partial(chunks.join, N=N)
    pieces = split(h_NxD), split(hdot_NxD.astype(dtype)), split(labels_N, fill=-1), split(weights_N)
    every = (at_head, at_head, at_tangent, *([] if loss.soft_cap is None else [at_head]))
    totals, hbars = chunks.each(one, tuple(x.zero() for x in every), pieces)
    results = [x.result(total, join(hbar)) for x, total, hbar in zip(every, totals, hbars, strict=True)]
    gradient, gauss_newton, functional = results[:3]
    if loss.soft_cap is not None:
        hbar_NxD, wbar_VxD, bbar_V = results[3]
        functional = HeadGradients(functional.hbar_NxD + hbar_NxD, functional.wbar_VxD + wbar_VxD, bbar_V)
    elif bias_V is not None:
        functional = functional._replace(bbar_V=jnp.zeros_like(bias_V))
    return HeadCurvature(gradient, gauss_newton, functional)


def _gauss_newton(z_CxV: jax.Array, zdot_CxV: jax.Array, lse_C: jax.Array, loss: Loss) -> jax.Array:
    """The Hessian of unweighted rows' losses at the capped logits z, times ż."""
    # p∘ż − p pᵀż is the same for ż − ż_top, and loses no digits where p_top → 1.
    shift_Cx1 = jnp.take_along_axis(zdot_CxV, jnp.argmax(z_CxV, axis=-1)[:, None], axis=-1)
    zdot_CxV, lse_Cx1 = zdot_CxV - shift_Cx1, lse_C[:, None]
    softmax_CxV = jnp.exp(z_CxV - lse_Cx1)
    mean_Cx1 = jnp.sum(softmax_CxV * zdot_CxV, axis=-1, keepdims=True)
    of_z_loss = 2 * loss.z_loss * (mean_Cx1 + shift_Cx1)
    return softmax_CxV * ((1 + 2 * loss.z_loss * lse_Cx1) * (zdot_CxV - mean_Cx1) + of_z_loss)
