"""What happens to a chunk of logits between the matrix products: row statistics, cotangent, soft-cap.

`linear_cross_entropy` and `logit_vjp` put the library's matrix products around a module like this one: this one in the
`torch` backend, `fsam_kernels.triton.softmax_stats` in the `triton` backend. `SoftmaxOps` says what such a module
offers. Formulas in `fsam_kernels.spec`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol

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


class Part(NamedTuple):
    """What a part of the vocabulary adds to a row's figures, [C], or several parts one by one, [parts, C].

    The largest z; Σ exp(z − that) of the columns that are not the target; the target's z, −inf where it is in another
    part; Σ z for label smoothing, else None. Of no columns they are −inf, 0, −inf and 0.
    """

    top_PxC: Tensor
    others_PxC: Tensor
    target_PxC: Tensor
    total_PxC: Tensor | None = None


class SoftmaxOps(Protocol):
    """What a backend's `softmax_stats` module offers; the contracts are those of the functions in this module."""

    def empty_chunk(self, C: int, V: int, like: Tensor) -> Tensor: ...

    def statistics(self, u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Rows, Tensor]: ...

    def part(self, u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Part, Tensor]: ...

    def exponentials(self, u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor: ...

    @property
    def cotangent(self) -> Any: ...  # its first argument is named by what the backend goes on from

    def through_cap_(self, p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None: ...


def empty_chunk(C: int, V: int, like: Tensor) -> Tensor:
    """An uninitialised [C, V] for logits, of the dtype and device of `like`; a backend may pad its rows."""
    return like.new_empty(C, V)


def statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Rows, Tensor]:
    """(the rows' figures, exp(z − top) for `cotangent` to go on from).

    Without a soft-cap the exponentials take the place of logits that are float32 or float64 already.

    Raises:
        RuntimeError: from PyTorch, for a label ≥ V.
    """
    whole, e_CxV = _part(u_CxV, labels_C >= 0, labels_C.clamp_min(0), loss)
    total_1xC = None if whole.total_PxC is None else whole.total_PxC[None]
    alone = Part(whole.top_PxC[None], whole.others_PxC[None], whole.target_PxC[None], total_1xC)
    return combined(alone, labels_C, loss, u_CxV.shape[1]), e_CxV


def part(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Part, Tensor]:
    """(what these columns of a wider vocabulary add to the rows' figures, exp(z − top) with their own top).

    A label ≥ V is of a column that is not among these V, which may be none at all.
    """
    C, V = u_CxV.shape
    if V == 0:
        none_C = u_CxV.new_full((C,), -torch.inf, dtype=wide(u_CxV))
        nothing_C = torch.zeros_like(none_C)
        return Part(none_C, nothing_C, none_C, nothing_C if loss.label_smoothing else None), u_CxV.to(none_C.dtype)
    here_C = (labels_C >= 0) & (labels_C < V)
    return _part(u_CxV, here_C, torch.where(here_C, labels_C, 0), loss)


def combined(parts: Part, labels_C: Tensor, loss: Loss, V: int) -> Rows:
    """The rows' figures from those of all parts of the V columns, given as [parts, C]; a negative label is ignored."""
    s, top_C = loss.label_smoothing, parts.top_PxC.amax(0)
    gap_C = parts.target_PxC.amax(0) - top_C  # 0 where the target is the row's largest
    others_C = (parts.others_PxC * (parts.top_PxC - top_C).exp()).sum(0)
    sum_C = others_C + gap_C.exp()
    # Where the row is sure, sum is 1 + others and rounds to 1; log1p keeps the others, and so the loss's digits.
    log_sum_C = (others_C + gap_C.expm1()).log1p()
    lse_C = top_C + log_sum_C
    loss_C, r = log_sum_C - gap_C, 2 * loss.z_loss * lse_C
    if s:
        assert parts.total_PxC is not None
        loss_C = (1 - s) * loss_C + s * (log_sum_C + top_C - parts.total_PxC.sum(0) / V)
    if loss.z_loss:
        loss_C = loss_C + loss.z_loss * lse_C.square()
    target_C = r - (1 + r) * (others_C / sum_C) + (s - loss.floor(V))
    of_seen = lambda x_C: torch.where(labels_C >= 0, x_C, 0)
    return Rows(of_seen(loss_C), lse_C, top_C, of_seen((1 + r) / sum_C), of_seen(target_C))


def exponentials(u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor:
    """exp(z − top), as `statistics` leaves it, from a `top` that is known."""
    return _capped(u_CxV, loss).sub_(top_C[:, None]).exp_()


def cotangent(e_CxV: Tensor, rows: Rows, labels_C: Tensor, loss: Loss, out_CxV: Tensor) -> None:
    """P, the cotangent of unweighted rows, into `out_CxV`, which may be `e_CxV`; `e_CxV` is overwritten.

    The target of a label ≥ V is in none of these columns.
    """
    V = e_CxV.shape[1]
    if V == 0:
        return
    e_CxV.mul_(rows.scale_C[:, None])
    if loss.label_smoothing:
        e_CxV.sub_((labels_C >= 0).to(e_CxV.dtype)[:, None], alpha=loss.floor(V))
    _put(e_CxV, labels_C.clamp(0, V - 1), rows.target_C, (labels_C >= 0) & (labels_C < V))
    if out_CxV is not e_CxV:
        out_CxV.copy_(e_CxV)


def through_cap_(p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None:
    """P times the soft-cap's derivative 1 − tanh²(u / c), in place."""
    p_CxV.mul_((u_CxV.to(wide(u_CxV)) / soft_cap).tanh_().square_().neg_().add_(1))


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def finite(top_C: Tensor) -> Tensor:
    """What is taken off the logits before exp: 0 where all are −inf (a masked part of the vocabulary)."""
    return torch.where(top_C == -torch.inf, 0, top_C)


def softmax_ops(name: str) -> SoftmaxOps:
    """The `softmax_stats` module of backend "torch" or "triton"."""
    return importlib.import_module(f"fsam_kernels.{name}.softmax_stats")


def _capped(u_CxV: Tensor, loss: Loss) -> Tensor:
    """z in the wide dtype: u itself where that is z already, else a new tensor."""
    if loss.soft_cap is None:
        return u_CxV.to(wide(u_CxV))
    return (u_CxV.to(wide(u_CxV)) / loss.soft_cap).tanh_().mul_(loss.soft_cap)


def _part(u_CxV: Tensor, here_C: Tensor, index_C: Tensor, loss: Loss) -> tuple[Part, Tensor]:
    """`part`, of rows whose target is in column `index_C` where `here_C` says so, and in none of these elsewhere."""
    z_CxV = _capped(u_CxV, loss)
    total_C = z_CxV.sum(1) if loss.label_smoothing else None
    top_C = z_CxV.amax(1)
    target_C = torch.where(here_C, z_CxV.gather(1, index_C[:, None])[:, 0], -torch.inf)
    e_CxV = z_CxV.sub_(finite(top_C)[:, None]).exp_()
    others_C = _put(e_CxV, index_C, torch.zeros_like(top_C), here_C).sum(1)
    return Part(top_C, others_C, target_C, total_C), e_CxV


def _put(e_CxV: Tensor, index_C: Tensor, values_C: Tensor, where_C: Tensor) -> Tensor:
    """A value into one column of the rows that `where_C` names, in place."""
    index_Cx1 = index_C[:, None]
    return e_CxV.scatter_(1, index_Cx1, torch.where(where_C[:, None], values_C[:, None], e_CxV.gather(1, index_Cx1)))
