"""The work on a chunk of logits between the matrix products: row statistics, cotangent, soft-cap.

`linear_cross_entropy` and `logit_vjp` take the matrix products from the library and everything between them from a
module with the functions of `SoftmaxOps`: this module in the `torch` backend, `fsam_kernels.triton.softmax_stats` in
the `triton` backend. Formulas: `fsam_kernels.spec`.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fsam_kernels.options import Loss

IN_PLACE = False  # half-precision logits get float32 exponentials beside them


class RowStats(NamedTuple):
    """Each row's loss, lse, and the three numbers that give its cotangent; float32 (float64 for float64 logits).

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; scale = target = 0 on an ignored row.
    """

    loss_C: Tensor
    lse_C: Tensor
    top_C: Tensor
    scale_C: Tensor
    target_C: Tensor


class PartialStats(NamedTuple):
    """The statistics of a row over some columns of the vocabulary: [C], or [parts, C] for several sets of columns.

    top: the largest z. others: Σ exp(z − top) over the columns other than the target. target: the target's z, −inf
    where the target is in another set. total: Σ z under label smoothing, else None. Without columns they are −inf, 0,
    −inf and 0.
    """

    top_PxC: Tensor
    others_PxC: Tensor
    target_PxC: Tensor
    total_PxC: Tensor | None = None


class SoftmaxOps(Protocol):
    """The functions of a backend's `softmax_stats` module; the contracts are those of the functions in this module.

    The tensor that `statistics`, `partial_statistics` and `exponentials` return for `cotangent` is the backend's own
    choice: exponentials here, the logits themselves in Triton. Its name therefore differs, and the parameters of
    `cotangent` are positional.

    Attributes:
        IN_PLACE: whether the logits' own array is overwritten in every dtype (`memory.row_bytes`).
    """

    IN_PLACE: bool

    def empty_chunk(self, C: int, V: int, like: Tensor) -> Tensor: ...

    def statistics(self, u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[RowStats, Tensor]: ...

    def partial_statistics(self, u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[PartialStats, Tensor]: ...

    def exponentials(self, u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor: ...

    def cotangent(
        self, state_CxV: Tensor, rows: RowStats, labels_C: Tensor, loss: Loss, out_CxV: Tensor, /
    ) -> None: ...

    def through_cap_(self, p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None: ...


def empty_chunk(C: int, V: int, like: Tensor) -> Tensor:
    """An uninitialised [C, V] for logits with the dtype and device of `like`; a backend may pad the rows."""
    return like.new_empty(C, V)


def statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[RowStats, Tensor]:
    """(the rows' statistics, exp(z − top) for `cotangent`).

    Without a soft-cap the exponentials overwrite logits that are float32 or float64 already.

    Raises:
        RuntimeError: from PyTorch, for a label ≥ V.
    """
    whole, e_CxV = _partial_statistics(u_CxV, labels_C >= 0, labels_C.clamp_min(0), loss)
    total_1xC = None if whole.total_PxC is None else whole.total_PxC[None]
    alone = PartialStats(whole.top_PxC[None], whole.others_PxC[None], whole.target_PxC[None], total_1xC)
    return combine_partials(alone, labels_C, loss, u_CxV.shape[1]), e_CxV


def partial_statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[PartialStats, Tensor]:
    """(the rows' statistics over these V columns of a larger vocabulary, exp(z − top) with these columns' top).

    A label ≥ V belongs to another column. V may be 0.
    """
    C, V = u_CxV.shape
    if V == 0:
        none_C = u_CxV.new_full((C,), -torch.inf, dtype=accum_dtype(u_CxV))
        nothing_C = torch.zeros_like(none_C)
        total_C = nothing_C if loss.label_smoothing else None
        return PartialStats(none_C, nothing_C, none_C, total_C), u_CxV.to(none_C.dtype)
    here_C = (labels_C >= 0) & (labels_C < V)
    return _partial_statistics(u_CxV, here_C, torch.where(here_C, labels_C, 0), loss)


def combine_partials(parts: PartialStats, labels_C: Tensor, loss: Loss, V: int) -> RowStats:
    """The rows' statistics over all V columns, from those of every part as [parts, C]; a negative label is ignored."""
    s, top_C = loss.label_smoothing, parts.top_PxC.amax(0)
    gap_C = parts.target_PxC.amax(0) - top_C  # 0 where the target is the row's largest
    others_C = (parts.others_PxC * (parts.top_PxC - top_C).exp()).sum(0)
    sum_C = others_C + gap_C.exp()
    # On a confident row, sum = 1 + others rounds to 1. log1p(others) keeps the digits of others, and so of the loss.
    log_sum_C = (others_C + gap_C.expm1()).log1p()
    lse_C = top_C + log_sum_C
    loss_C, r = log_sum_C - gap_C, 2 * loss.z_loss * lse_C
    if s:
        assert parts.total_PxC is not None
        loss_C = (1 - s) * loss_C + s * (log_sum_C + top_C - parts.total_PxC.sum(0) / V)
    if loss.z_loss:
        loss_C = loss_C + loss.z_loss * lse_C.square()
    target_C = r - (1 + r) * (others_C / sum_C) + (s - loss.floor(V))
    or_zero = lambda x_C: torch.where(labels_C >= 0, x_C, 0)
    return RowStats(or_zero(loss_C), lse_C, top_C, or_zero((1 + r) / sum_C), or_zero(target_C))


def exponentials(u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor:
    """exp(z − top), as `statistics` returns it, from a known `top`."""
    return _capped(u_CxV, loss).sub_(top_C[:, None]).exp_()


def cotangent(e_CxV: Tensor, rows: RowStats, labels_C: Tensor, loss: Loss, out_CxV: Tensor) -> None:
    """Write P, the cotangent of unweighted rows, to `out_CxV`, which may be `e_CxV`; `e_CxV` is overwritten.

    The target of a label ≥ V is not among these columns.
    """
    V = e_CxV.shape[1]
    if V == 0:
        return
    e_CxV.mul_(rows.scale_C[:, None])
    if loss.label_smoothing:
        e_CxV.sub_((labels_C >= 0).to(e_CxV.dtype)[:, None], alpha=loss.floor(V))
    _scatter_column(e_CxV, labels_C.clamp(0, V - 1), rows.target_C, (labels_C >= 0) & (labels_C < V))
    if out_CxV is not e_CxV:
        out_CxV.copy_(e_CxV)


def through_cap_(p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None:
    """Multiply P by the soft-cap's derivative 1 − tanh²(u / c), in place."""
    p_CxV.mul_((u_CxV.to(accum_dtype(u_CxV)) / soft_cap).tanh_().square_().neg_().add_(1))


def accum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def finite_top(top_C: Tensor) -> Tensor:
    """The number to subtract from the logits before exp: 0 where all are −inf (a masked part of the vocabulary)."""
    return torch.where(top_C == -torch.inf, 0, top_C)


def softmax_ops(name: str) -> SoftmaxOps:
    """The `softmax_stats` module of backend "torch" or "triton"."""
    return importlib.import_module(f"fsam_kernels.{name}.softmax_stats")


def _capped(u_CxV: Tensor, loss: Loss) -> Tensor:
    """z in the dtype of sums: u itself where that is z already, else a new tensor."""
    if loss.soft_cap is None:
        return u_CxV.to(accum_dtype(u_CxV))
    return (u_CxV.to(accum_dtype(u_CxV)) / loss.soft_cap).tanh_().mul_(loss.soft_cap)


def _partial_statistics(u_CxV: Tensor, here_C: Tensor, index_C: Tensor, loss: Loss) -> tuple[PartialStats, Tensor]:
    """`partial_statistics` of rows whose target is column `index_C`; where `here_C` is False, none of the columns."""
    z_CxV = _capped(u_CxV, loss)
    total_C = z_CxV.sum(1) if loss.label_smoothing else None
    top_C = z_CxV.amax(1)
    target_C = torch.where(here_C, z_CxV.gather(1, index_C[:, None])[:, 0], -torch.inf)
    e_CxV = z_CxV.sub_(finite_top(top_C)[:, None]).exp_()
    others_C = _scatter_column(e_CxV, index_C, torch.zeros_like(top_C), here_C).sum(1)
    return PartialStats(top_C, others_C, target_C, total_C), e_CxV


def _scatter_column(e_CxV: Tensor, index_C: Tensor, values_C: Tensor, where_C: Tensor) -> Tensor:
    """Write one value to one column of every row where `where_C` is True, in place."""
    index_Cx1 = index_C[:, None]
    return e_CxV.scatter_(1, index_Cx1, torch.where(where_C[:, None], values_C[:, None], e_CxV.gather(1, index_Cx1)))
