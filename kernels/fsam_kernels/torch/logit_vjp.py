"""The vjp of a linear head with a given logit cotangent: at the same weights, or at the perturbed ones."""

from __future__ import annotations

from torch import Tensor

from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.linear_cross_entropy import Cotangent, HeadGradients, Sums, chunks, outside_autograd, product
from fsam_kernels.torch.softmax_stats import SoftmaxOps


@outside_autograd
def logit_vjp(
    cotangent: Cotangent,
    h_NxD: Tensor,
    w_VxD: Tensor,
    *,
    bias_V: Tensor | None = None,
    upcast_wbar: bool = False,
    onto_VxD: Tensor | None = None,
    chunk_bytes: int | None = None,
    softmax: SoftmaxOps = plain,
) -> HeadGradients:
    """(h̄_NxD, w̄_VxD, b̄_V) of `spec.logit_vjp`; w̄ and b̄ are summed in float32, all in the dtypes of h, w and b.

    A kept cotangent costs the two matrix products and nothing else, unless there is a soft-cap, whose derivative is
    taken at this head. Otherwise the cotangent is recomputed from its own head, chunk by chunk.

    Args:
        h_NxD, w_VxD, bias_V: the head, with the shapes of the head of the cotangent; `bias_V` if and only if that head
            had a bias.
        upcast_wbar, onto_VxD, chunk_bytes, softmax: as in `linear_cross_entropy`.
    """
    base, soft_cap = cotangent, cotangent.loss.soft_cap
    h_NxD, w_VxD = h_NxD.detach(), w_VxD.detach()
    bias_V = None if bias_V is None else bias_V.detach()
    total = Sums(h_NxD, w_VxD, bias_V, base.weights_N, upcast_wbar, onto_VxD, base.vocabulary)
    if base.kept_NxV is not None and soft_cap is None:
        total.add(base.kept_NxV, slice(None))
        return total.result()
    moved = product(w_VxD, bias_V, h_NxD.dtype, softmax)
    if base.h_NxD is not None and base.w_VxD is not None:
        logits = product(base.w_VxD, base.bias_V, base.h_NxD.dtype, softmax)

    def one(rows: slice) -> None:  # a function, so that a chunk's tensors are freed before the next chunk's exist
        if base.kept_NxV is not None:
            p_CxV = base.kept_NxV[rows].clone()
        else:
            assert base.h_NxD is not None
            u_CxV = logits(base.h_NxD[rows])
            e_CxV = softmax.exponentials(u_CxV, base.top_N[rows], base.loss)
            p_CxV = e_CxV if e_CxV.dtype == u_CxV.dtype else u_CxV
            softmax.cotangent(e_CxV, base.rows(rows), base.labels_N[rows], base.loss, p_CxV)
        if soft_cap is not None:
            softmax.through_cap_(p_CxV, moved(h_NxD[rows]), soft_cap)
        total.add(p_CxV, rows)

    for rows in chunks(h_NxD, w_VxD, base.loss, chunk_bytes, softmax, base.vocabulary):
        one(rows)
    return total.result()
