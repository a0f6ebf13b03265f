"""A linear head's gradient, and its derivative along a tangent of the head, in the two summands of H = G + N."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fsam_kernels.memory import chunk_rows
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.linear_cross_entropy import HeadGradients, Sums, outside_autograd, product
from fsam_kernels.torch.softmax_stats import accum_dtype

ARRAYS = 6  # of a chunk's logits' shape that exist at the same time


class HeadCurvature(NamedTuple):
    """The gradient at the head, and the Gauss–Newton and the functional summand of its derivative."""

    gradient: HeadGradients
    gauss_newton: HeadGradients
    functional: HeadGradients


@outside_autograd
def head_curvature(
    h_NxD: Tensor,
    w_VxD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    hdot_NxD: Tensor,
    wdot_VxD: Tensor,
    *,
    bias_V: Tensor | None = None,
    bias_dot_V: Tensor | None = None,
    loss: Loss = CROSS_ENTROPY,
    chunk_bytes: int | None = None,
) -> HeadCurvature:
    """`spec.head_curvature`, and the gradient, whose logits are the same: nine matrix products, no N×V tensor.

    With a soft-cap it is eleven, because the derivative of the tanh has a tangent of its own.

    Args:
        h_NxD, w_VxD, labels_N, weights_N, bias_V, loss: as in `linear_cross_entropy`; W is complete here.
        hdot_NxD, wdot_VxD, bias_dot_V: tangents with the shapes of h, W and b; the last if and only if there is a bias.
        chunk_bytes: rows are processed in chunks whose ARRAYS tensors fill about this much; None as there.

    Returns:
        h̄, w̄ and b̄ of each in the dtypes of h, w and b; w̄ and b̄ are summed over chunks in float32 or float64.
    """
    h_NxD, w_VxD, dtype = h_NxD.detach(), w_VxD.detach(), h_NxD.dtype
    bias_V = None if bias_V is None else bias_V.detach()
    hdot_NxD, wdot_VxD = hdot_NxD.to(dtype), wdot_VxD.to(w_VxD.dtype)
    weights_N = torch.where(labels_N >= 0, weights_N, 0).to(accum_dtype(h_NxD))
    at_head = lambda: Sums(h_NxD, w_VxD, bias_V, weights_N, False)
    base, gauss_newton, moved = at_head(), at_head(), at_head() if loss.soft_cap is not None else None
    held = Sums(hdot_NxD, wdot_VxD, None, weights_N, False)
    logits, over_w = product(w_VxD, bias_V, dtype, plain), product(w_VxD, bias_dot_V, dtype, plain)
    over_wdot = product(wdot_VxD, None, dtype, plain)

    def one(rows: slice) -> None:  # a function, so that a chunk's tensors are freed before the next chunk's exist
        labels_C = labels_N[rows]
        u_CxV = logits(h_NxD[rows]).to(weights_N.dtype)
        udot_CxV = over_w(hdot_NxD[rows]).add_(over_wdot(h_NxD[rows])).to(weights_N.dtype)
        row, p_CxV = plain.statistics(u_CxV.clone(), labels_C, loss)
        plain.cotangent(p_CxV, row, labels_C, loss, p_CxV)
        if moved is not None and loss.soft_cap is not None:
            tanh_CxV = (u_CxV / loss.soft_cap).tanh_()
            t_CxV = 1 - tanh_CxV.square()
            gauss_newton.add(_gauss_newton(u_CxV, udot_CxV * t_CxV, row.lse_C, loss).mul_(t_CxV), rows)
            p_CxV *= t_CxV
            moved.add(tanh_CxV.mul_(-2 / loss.soft_cap).mul_(udot_CxV).mul_(p_CxV), rows)
        else:
            gauss_newton.add(_gauss_newton(u_CxV, udot_CxV, row.lse_C, loss), rows)
        base.add(p_CxV, rows)
        held.add(p_CxV, rows)

    sizes = h_NxD.element_size(), weights_N.element_size()
    N, columns = len(h_NxD), ARRAYS * len(w_VxD)
    C = chunk_rows(columns, *sizes, CROSS_ENTROPY, chunk_bytes, h_NxD.device.type, N=N)
    for start in range(0, N, C):
        one(slice(start, start + C))
    functional = held.result()
    if moved is not None:
        hbar_NxD, wbar_VxD, bbar_V = moved.result()
        functional = HeadGradients(functional.hbar_NxD + hbar_NxD, functional.wbar_VxD + wbar_VxD, bbar_V)
    elif bias_V is not None:
        functional = functional._replace(bbar_V=torch.zeros_like(bias_V))
    return HeadCurvature(base.result(), gauss_newton.result(), functional)


def _gauss_newton(u_CxV: Tensor, zdot_CxV: Tensor, lse_C: Tensor, loss: Loss) -> Tensor:
    """The Hessian of unweighted rows' losses at the capped logits z, times ż; u is overwritten."""
    # p∘ż − p pᵀż is the same for ż − ż_top, and loses no digits where p_top → 1.
    shift_C = zdot_CxV.gather(1, u_CxV.argmax(1, keepdim=True))[:, 0]
    zdot_CxV = zdot_CxV - shift_C[:, None]
    softmax_CxV = plain.exponentials(u_CxV, lse_C, loss)
    mean_C = (softmax_CxV * zdot_CxV).sum(1)
    q_CxV = zdot_CxV.sub_(mean_C[:, None]).mul_((1 + 2 * loss.z_loss * lse_C)[:, None])
    return q_CxV.add_((2 * loss.z_loss * (mean_C + shift_C))[:, None]).mul_(softmax_CxV)
