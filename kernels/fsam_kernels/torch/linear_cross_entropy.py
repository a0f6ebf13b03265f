"""Cross entropy of a linear head, and the logit cotangent in a form that can be applied more than once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows are taken in chunks whose float32 logits fill this many bytes, so that no N×V tensor is ever whole.
CHUNK_BYTES = 32 * 2**20


class Cotangent(NamedTuple):
    """z̄ = weight (softmax(h Wᵀ) − onehot(y)), kept as what it is recomputed from: N·D + 5N values, not N·V.

    The head weight is the unperturbed parameter's own storage, so it costs no memory. With e = exp(z − top) and
    miss = 1 − p_y, the share of the other columns:  z̄_v = weight e_v / sum,  z̄_y = −weight miss.
    """

    h_NxD: Tensor
    w_VxD: Tensor
    top_N: Tensor
    sum_N: Tensor
    miss_N: Tensor
    labels_N: Tensor
    weights_N: Tensor


@torch.no_grad()
def linear_cross_entropy(
    h_NxD: Tensor, w_VxD: Tensor, labels_N: Tensor, weights_N: Tensor, *, gradient: bool = False
) -> tuple[Tensor, Tensor, Cotangent, tuple[Tensor, Tensor] | None]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n, its (h̄, w̄) at this same head or None).

    With `gradient` the head's gradients are formed while a chunk's logits exist, which saves the ordinary backward pass
    one matrix product. Formulas in `spec.linear_cross_entropy` and `spec.logit_vjp`.

    Args:
        h_NxD: last hidden states, any float dtype.
        w_VxD: head weight.
        labels_N: int64; a negative one makes its row ignored.
        weights_N: weight of each row in the mean, already divided by its normaliser.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input); h̄ and w̄ in the dtypes of h and w.

    Raises:
        IndexError, RuntimeError: from PyTorch, for a label ≥ V.
    """
    h_NxD, w_VxD = h_NxD.detach(), w_VxD.detach()
    dtype = wide(h_NxD)
    weights_N = torch.where(labels_N >= 0, weights_N, 0).to(dtype)
    loss_N, lse_N, top_N, sum_N, miss_N = (h_NxD.new_empty(len(h_NxD), dtype=dtype) for _ in range(5))
    hbar_NxD = torch.empty_like(h_NxD) if gradient else None
    wbar_VxD = torch.zeros_like(w_VxD, dtype=dtype) if gradient else None
    for rows in chunks(h_NxD, w_VxD):
        z_CxV = (h_NxD[rows] @ w_VxD.to(h_NxD.dtype).T).to(dtype)
        index_Cx1 = labels_N[rows].clamp_min(0)[:, None]
        top_Cx1 = z_CxV.amax(1, keepdim=True)
        gap_Cx1 = z_CxV.gather(1, index_Cx1) - top_Cx1  # 0 where the target is the row's largest
        others_Cx1 = z_CxV.sub_(top_Cx1).exp_().scatter_(1, index_Cx1, 0).sum(1, keepdim=True)
        sum_Cx1 = others_Cx1 + gap_Cx1.exp()
        # Where the row is sure, sum is 1 + others and rounds to 1; log1p keeps the others, and so the loss's digits.
        log_sum_Cx1 = (others_Cx1 + gap_Cx1.expm1()).log1p()
        miss_Cx1 = others_Cx1 / sum_Cx1
        top_N[rows], sum_N[rows], miss_N[rows] = top_Cx1[:, 0], sum_Cx1[:, 0], miss_Cx1[:, 0]
        lse_N[rows] = (top_Cx1 + log_sum_Cx1)[:, 0]
        loss_N[rows] = torch.where(labels_N[rows] >= 0, (log_sum_Cx1 - gap_Cx1)[:, 0], 0)
        if hbar_NxD is not None and wbar_VxD is not None:
            weights_Cx1 = weights_N[rows][:, None]
            z_CxV.mul_(weights_Cx1 / sum_Cx1).scatter_(1, index_Cx1, -miss_Cx1 * weights_Cx1)
            contract(z_CxV, h_NxD[rows], w_VxD, hbar_NxD[rows], wbar_VxD)
    gradients = (hbar_NxD, wbar_VxD.to(w_VxD.dtype)) if hbar_NxD is not None and wbar_VxD is not None else None
    return loss_N, lse_N, Cotangent(h_NxD, w_VxD, top_N, sum_N, miss_N, labels_N, weights_N), gradients


def contract(zbar_CxV: Tensor, h_CxD: Tensor, w_VxD: Tensor, hbar_CxD: Tensor, wbar_VxD: Tensor) -> None:
    """h̄ = z̄ W into `hbar_CxD`, and z̄ᵀ h added to `wbar_VxD`, which is float32 or float64 whatever h is."""
    zbar_CxV = zbar_CxV.to(h_CxD.dtype)
    torch.mm(zbar_CxV, w_VxD.to(h_CxD.dtype), out=hbar_CxD)
    if wbar_VxD.dtype == h_CxD.dtype:
        wbar_VxD.addmm_(zbar_CxV.T, h_CxD)
    else:
        wbar_VxD += zbar_CxV.T @ h_CxD


def chunks(h_NxD: Tensor, w_VxD: Tensor) -> list[slice]:
    """Slices of rows whose logits stay within CHUNK_BYTES (one row at the least)."""
    rows = max(1, CHUNK_BYTES // (wide(h_NxD).itemsize * len(w_VxD)))
    return [slice(start, start + rows) for start in range(0, len(h_NxD), rows)]


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)
