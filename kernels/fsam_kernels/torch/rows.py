"""What happens to a chunk of logits between the matrix products: row statistics, cotangent, soft-cap.

These are the stages that the `triton` backend replaces; `linear_cross_entropy` and `logit_vjp` put the library's matrix
products around either. Formulas in `fsam_kernels.spec`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fsam_kernels.options import Loss


class Rows(NamedTuple):
    """A row's loss, lse, and what its cotangent is recomputed from; all in float32 (float64 for float64 logits).

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; scale = target = 0 where the row is ignored.
    """

    loss_C: Tensor
    lse_C: Tensor
    top_C: Tensor
    scale_C: Tensor
    target_C: Tensor


def empty_chunk(C: int, V: int, like: Tensor) -> Tensor:
    """An uninitialised [C, V] for logits, of the dtype and device of `like`; a backend may pad its rows."""
    return like.new_empty(C, V)


def statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Rows, Tensor]:
    """(the rows' figures, exp(z − top) for `cotangent` to go on from).

    Without a soft-cap the exponentials take the place of logits that are float32 or float64 already.

    Raises:
        RuntimeError: from PyTorch, for a label ≥ V.
    """
    V, s = u_CxV.shape[1], loss.label_smoothing
    z_CxV = _capped(u_CxV, loss)
    seen_C, index_Cx1 = labels_C >= 0, labels_C.clamp_min(0)[:, None]
    mean_Cx1 = z_CxV.mean(1, keepdim=True) if s else None
    top_Cx1 = z_CxV.amax(1, keepdim=True)
    gap_Cx1 = z_CxV.gather(1, index_Cx1) - top_Cx1  # 0 where the target is the row's largest
    e_CxV = z_CxV.sub_(top_Cx1).exp_()
    others_Cx1 = e_CxV.scatter_(1, index_Cx1, 0).sum(1, keepdim=True)
    sum_Cx1 = others_Cx1 + gap_Cx1.exp()
    # Where the row is sure, sum is 1 + others and rounds to 1; log1p keeps the others, and so the loss's digits.
    log_sum_Cx1 = (others_Cx1 + gap_Cx1.expm1()).log1p()
    lse_Cx1 = top_Cx1 + log_sum_Cx1
    loss_Cx1, r = log_sum_Cx1 - gap_Cx1, 2 * loss.z_loss * lse_Cx1
    if mean_Cx1 is not None:
        loss_Cx1 = (1 - s) * loss_Cx1 + s * (log_sum_Cx1 + top_Cx1 - mean_Cx1)
    if loss.z_loss:
        loss_Cx1 = loss_Cx1 + loss.z_loss * lse_Cx1.square()
    target_Cx1 = r - (1 + r) * (others_Cx1 / sum_Cx1) + (s - loss.floor(V))
    of_seen = lambda x_Cx1: torch.where(seen_C, x_Cx1[:, 0], 0)
    rows = Rows(
        of_seen(loss_Cx1), lse_Cx1[:, 0], top_Cx1[:, 0], of_seen((1 + r) / sum_Cx1), of_seen(target_Cx1)
    )  # fmt: skip
    return rows, e_CxV


def exponentials(u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor:
    """exp(z − top), as `statistics` leaves it, from a `top` that is known."""
    return _capped(u_CxV, loss).sub_(top_C[:, None]).exp_()


def cotangent(e_CxV: Tensor, rows: Rows, labels_C: Tensor, loss: Loss, out_CxV: Tensor) -> None:
    """P, the cotangent of unweighted rows, into `out_CxV`, which may be `e_CxV`; `e_CxV` is overwritten."""
    e_CxV.mul_(rows.scale_C[:, None])
    if loss.label_smoothing:
        e_CxV.sub_((labels_C >= 0).to(e_CxV.dtype)[:, None], alpha=loss.floor(e_CxV.shape[1]))
    e_CxV.scatter_(1, labels_C.clamp_min(0)[:, None], rows.target_C[:, None])
    if out_CxV is not e_CxV:
        out_CxV.copy_(e_CxV)


def through_cap_(p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None:
    """P times the soft-cap's derivative 1 − tanh²(u / c), in place."""
    p_CxV.mul_((u_CxV.to(wide(u_CxV)) / soft_cap).tanh_().square_().neg_().add_(1))


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def stages_called(name: str) -> ModuleType:
    """The module with these functions in backend "torch" or "triton"."""
    return importlib.import_module(f"fsam_kernels.{name}.rows")


def _capped(u_CxV: Tensor, loss: Loss) -> Tensor:
    """z in the wide dtype: u itself where that is z already, else a new tensor."""
    if loss.soft_cap is None:
        return u_CxV.to(wide(u_CxV))
    return (u_CxV.to(wide(u_CxV)) / loss.soft_cap).tanh_().mul_(loss.soft_cap)
