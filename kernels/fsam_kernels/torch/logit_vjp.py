"""The logit cotangent contracted with a head: the same one, or the head at the perturbed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fsam_kernels.torch.linear_cross_entropy import Cotangent, chunks, contract, wide


@torch.no_grad()
def logit_vjp(cotangent: Cotangent, h_NxD: Tensor, w_VxD: Tensor) -> tuple[Tensor, Tensor]:
    """(h̄_NxD, w̄_VxD) = (z̄ W, z̄ᵀ h), w̄ summed in float32; returned in the dtypes of h and w."""
    h_NxD, w_VxD = h_NxD.detach(), w_VxD.detach()
    base = cotangent
    hbar_NxD = torch.empty_like(h_NxD)
    wbar_VxD = torch.zeros_like(w_VxD, dtype=wide(h_NxD))
    for rows in chunks(base.h_NxD, base.w_VxD):
        z_CxV = (base.h_NxD[rows] @ base.w_VxD.to(base.h_NxD.dtype).T).to(wide(h_NxD))
        index_Cx1 = base.labels_N[rows].clamp_min(0)[:, None]
        weights_Cx1 = base.weights_N[rows][:, None]
        z_CxV.sub_(base.top_N[rows][:, None]).exp_().mul_(weights_Cx1 / base.sum_N[rows][:, None])
        z_CxV.scatter_(1, index_Cx1, -base.miss_N[rows][:, None] * weights_Cx1)
        contract(z_CxV, h_NxD[rows], w_VxD, hbar_NxD[rows], wbar_VxD)
    return hbar_NxD, wbar_VxD.to(w_VxD.dtype)
