"""Cross entropy of a linear head, and its logit cotangent in a form that can be applied more than once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fsam_kernels.memory import BLOCK, chunk_rows
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.softmax_stats import RowStats, SoftmaxOps, accum_dtype
from fsam_kernels.torch.vocabulary import Vocabulary

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Cotangent:
    """z̄ = weights P, in a form that `logit_vjp` can apply to any head, more than once.

    P_v = scale exp(z_v − top) − s/V off the target and P_y = target, with z from (h, W, b). A recomputed cotangent
    stores (h, W, b) and the row statistics, N·D + 5N values (the head weight is the parameter's own storage). A kept
    one stores P itself (`kept_NxV`) in the dtype of h, to which the matrix products would round it anyway; h, W and b
    are then None.

    With a vocabulary over ranks everything belongs to this rank's columns: P, labels, top, scale and loss
    (`Vocabulary`).
    """

    h_NxD: Tensor | None
    w_VxD: Tensor | None
    bias_V: Tensor | None
    top_N: Tensor
    scale_N: Tensor
    target_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    kept_NxV: Tensor | None
    loss: Loss
    vocabulary: Vocabulary | None = None

    def rows(self, rows: slice) -> RowStats:
        """The statistics of some rows; loss and lse are not stored, because nothing needs them."""
        top_C = self.top_N[rows]
        return RowStats(top_C, top_C, top_C, self.scale_N[rows], self.target_N[rows])


class HeadGradients(NamedTuple):
    """The cotangents of a head's hidden states, weight and bias (None where it has none)."""

    hbar_NxD: Tensor
    wbar_VxD: Tensor
    bbar_V: Tensor | None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, or autocast's where autocast is on for its device."""
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none
    return torch.get_autocast_dtype(device) if is_on else x.dtype


def outside_autograd(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function without a graph and without autocast: it chooses its dtypes itself."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> T:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        has_autocast = torch.amp.is_autocast_available(device)  # "meta" has none
        with torch.no_grad(), torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
            return function(*args, **options)

    return wrapped


@outside_autograd
def linear_cross_entropy(
    h_NxD: Tensor,
    w_VxD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    loss: Loss = CROSS_ENTROPY,
    gradient: bool = False,
    keep: bool = False,
    upcast_wbar: bool = False,
    onto_VxD: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    chunk_bytes: int | None = None,
    softmax: SoftmaxOps = plain,
) -> tuple[Tensor, Tensor, Cotangent, HeadGradients | None]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n, its vjp through this same head or None).

    With `gradient` the head's gradients are computed while a chunk's logits exist, which saves the ordinary backward
    pass one matrix product. Formulas: `spec.linear_cross_entropy` and `spec.logit_vjp`.

    Args:
        h_NxD: last hidden states, any float dtype, which is also the dtype of the products.
        w_VxD: head weight; pass a weight stored as [D, V] as its transposed view. For a float32 weight with a
            half-precision h, w̄ is returned in float32, as it was summed.
        labels_N: int64; a row with a negative label is ignored.
        weights_N: weight of each row in the mean, already divided by its normaliser.
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        keep: store P for a second vjp: N·V values in the dtype of h, and one matrix product fewer there.
        upcast_wbar: return w̄ and b̄ in float32, as they were summed, and not in the dtypes of w and b.
        onto_VxD: the matrix products add w̄ to this tensor in place, and it is returned as w̄. It has the dtype in which
            w̄ is summed.
        vocabulary: the ranks over which the vocabulary is sharded. w, b, w̄ and b̄ are then this rank's rows; everything
            else, labels included, is the same on every rank. In each chunk a rank sends three floats a row (four with
            label smoothing), and h̄ is all-reduced once. None if W is complete here.
        chunk_bytes: rows are processed in chunks whose working tensors fill at most this much (at least one row), so
            that no N×V tensor is allocated; None for the device's default. It changes nothing beyond rounding.
        softmax: the `softmax_stats` module of a backend, for the work between the matrix products.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input); h̄, w̄ and b̄ in the dtypes of h, w and b. w̄ and b̄ are
        summed over chunks in float32.

    Raises:
        RuntimeError, IndexError: from PyTorch, for a label ≥ V.
    """
    h_NxD, w_VxD = h_NxD.detach(), w_VxD.detach()
    bias_V = None if bias_V is None else bias_V.detach()
    local_loss = loss
    if vocabulary is not None:
        labels_N, local_loss = vocabulary.labels(labels_N, len(w_VxD)), vocabulary.local_loss(loss, len(w_VxD))
    accum = accum_dtype(h_NxD)
    weights_N = torch.where(labels_N >= 0, weights_N, 0).to(accum)
    stats = RowStats(*(h_NxD.new_empty(len(h_NxD), dtype=accum) for _ in RowStats._fields))
    kept_NxV = softmax.empty_chunk(len(h_NxD), len(w_VxD), h_NxD) if keep else None
    total = Sums(h_NxD, w_VxD, bias_V, weights_N, upcast_wbar, onto_VxD, vocabulary) if gradient else None
    base = product(w_VxD, bias_V, h_NxD.dtype, softmax)

    def one(rows: slice) -> None:  # a function, so that a chunk's tensors are freed before the next chunk's exist
        u_CxV, labels_C = base(h_NxD[rows]), labels_N[rows]
        if vocabulary is None:
            row, e_CxV = softmax.statistics(u_CxV, labels_C, loss)
        else:
            partial, e_CxV = softmax.partial_statistics(u_CxV, labels_C, loss)
            row = vocabulary.all_gather_stats(partial, labels_C, loss)
        torch._foreach_copy_([whole_N[rows] for whole_N in stats], list(row))
        if kept_NxV is not None:
            p_CxV = kept_NxV[rows]
        else:
            p_CxV = e_CxV if e_CxV.dtype == u_CxV.dtype else u_CxV
            if p_CxV is u_CxV and loss.soft_cap is not None:
                p_CxV = softmax.empty_chunk(len(u_CxV), u_CxV.shape[1], u_CxV)
        if keep or total is not None:
            softmax.cotangent(e_CxV, row, labels_C, local_loss, p_CxV)
        if total is not None:
            if loss.soft_cap is not None:
                p_CxV = p_CxV.clone() if keep else p_CxV
                softmax.through_cap_(p_CxV, u_CxV, loss.soft_cap)
            total.add(p_CxV, rows)

    for rows in chunks(h_NxD, w_VxD, loss, chunk_bytes, softmax, vocabulary):
        one(rows)
    h, w, b = (None, None, None) if keep else (h_NxD, w_VxD, bias_V)
    _, _, top_N, scale_N, target_N = stats
    cotangent = Cotangent(h, w, b, top_N, scale_N, target_N, labels_N, weights_N, kept_NxV, local_loss, vocabulary)
    return stats.loss_C, stats.lse_C, cotangent, None if total is None else total.result()


def chunks(
    h_NxD: Tensor,
    w_VxD: Tensor,
    loss: Loss,
    chunk_bytes: int | None,
    softmax: SoftmaxOps = plain,
    vocabulary: Vocabulary | None = None,
) -> list[slice]:
    """Slices of `memory.chunk_rows` rows, on every rank of a vocabulary the same."""
    columns = len(w_VxD) if vocabulary is None else vocabulary.widest
    sizes = h_NxD.element_size(), accum_dtype(h_NxD).itemsize
    N = len(h_NxD)
    rows = chunk_rows(columns, *sizes, loss, chunk_bytes, h_NxD.device.type, in_place=softmax.IN_PLACE, N=N)
    return [slice(start, start + rows) for start in range(0, N, rows)]


def product(
    w_VxD: Tensor, bias_V: Tensor | None, dtype: torch.dtype, softmax: SoftmaxOps
) -> Callable[[Tensor], Tensor]:
    """h -> u = h Wᵀ + b in `dtype`; the weight is cast once for all chunks."""
    w_DxV, bias_V = w_VxD.to(dtype).T, None if bias_V is None else bias_V.to(dtype)

    def logits(h_CxD: Tensor) -> Tensor:
        u_CxV = softmax.empty_chunk(len(h_CxD), w_DxV.shape[1], h_CxD)
        if bias_V is None:
            return torch.mm(h_CxD, w_DxV, out=u_CxV)
        return torch.addmm(bias_V, h_CxD, w_DxV, out=u_CxV)

    return logits


@functools.cache
def adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library adds a product of `dtype` to a float32 tensor itself, so that it is not rounded before.

    `torch.addmm(out_dtype=)` does so for half precision on a GPU. PyTorch 2.8 and 2.9 have the argument and refuse a
    float32 tensor to add to, and a CPU has no such product, so it is tried on a small one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


class Sums:
    """h̄ = weights (P W), and w̄ = Pᵀ (weights h), b̄ = Pᵀ weights, summed chunk by chunk in float32 or float64.

    With a vocabulary over ranks, h̄ is the sum over all ranks.

    `weights_N` have the dtype that sums are kept in. They multiply the tensors with D values a row, not those with V.
    In half precision they are divided by the largest weight (`unit`) first, because 1/N times a probability underflows
    in float16. Where the library adds bfloat16 products in float32, w̄ needs no unit, and so goes straight onto `onto`.
    """

    def __init__(
        self,
        h_NxD: Tensor,
        w_VxD: Tensor,
        bias_V: Tensor | None,
        weights_N: Tensor,
        upcast_wbar: bool,
        onto_VxD: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.upcast_wbar, self.vocabulary = upcast_wbar, vocabulary
        self.h_NxD, self.w_VxD, self.bias_V, self.weights_N = h_NxD, w_VxD, bias_V, weights_N
        self.accum = weights_N.dtype
        self.adds_in_float32 = adds_in_float32(h_NxD.dtype, h_NxD.device)
        has_unit = not (self.adds_in_float32 and h_NxD.dtype == torch.bfloat16)
        self.unit: Tensor | None = None
        if h_NxD.dtype != self.accum and len(weights_N) and (has_unit or bias_V is not None):
            # At least the smallest normal number: where all weights are 0, so are their quotients.
            self.unit = weights_N.abs().max().clamp(min=torch.finfo(self.accum).tiny)
        self.wbar_unit = self.unit if has_unit else None
        self.rounds_once = not has_unit
        self.cast_VxD = w_VxD.to(h_NxD.dtype)
        self.hbar_NxD = torch.empty_like(h_NxD)
        self.onto_VxD = onto_VxD
        if onto_VxD is not None and onto_VxD.dtype != self.accum:
            raise ValueError(f"onto_VxD: w̄ is summed in {self.accum}, got a tensor of {onto_VxD.dtype}")
        # Without a unit the products add to `onto` directly; with one, the sum is multiplied by it before it is added.
        self.wbar_VxD = onto_VxD if self.wbar_unit is None else None
        self.bbar_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=self.accum)

    def add(self, p_CxV: Tensor, rows: slice) -> None:
        """Contract one chunk's P with its head."""
        h_CxD, weights_C = self.h_NxD[rows], self.weights_N[rows]
        p_CxV = p_CxV.to(h_CxD.dtype)
        torch.mm(p_CxV, self.cast_VxD, out=self.hbar_NxD[rows])
        self.hbar_NxD[rows].mul_(weights_C[:, None])
        relative_C = None
        if not self.rounds_once or self.bbar_V is not None:
            relative_C = (weights_C if self.unit is None else weights_C / self.unit).to(h_CxD.dtype)
        if relative_C is not None and not self.rounds_once:
            weighted_CxD = h_CxD * relative_C[:, None]
        else:  # the weights alone, rounded to bfloat16, would be wrong by as much in every row
            weighted_CxD = torch.mul(h_CxD, weights_C[:, None], out=torch.empty_like(h_CxD))
        self._add_to_wbar(p_CxV, weighted_CxD)
        if self.bbar_V is not None and relative_C is not None:
            self.bbar_V += p_CxV.T @ relative_C

    def _add_to_wbar(self, p_CxV: Tensor, weighted_CxD: Tensor) -> None:
        first = self.wbar_VxD is None
        if self.wbar_VxD is None:  # not zero-filled: touching new pages costs an eighth of the product
            self.wbar_VxD = torch.empty_like(self.w_VxD, dtype=self.accum)
        if self.adds_in_float32 or weighted_CxD.dtype == self.accum:
            options: dict[str, Any] = {"out_dtype": self.accum} if self.adds_in_float32 else {}
            if first:
                torch.mm(p_CxV.T, weighted_CxD, out=self.wbar_VxD, **options)
            else:
                torch.addmm(self.wbar_VxD, p_CxV.T, weighted_CxD, out=self.wbar_VxD, **options)
            return
        # The library sums one product in float32 and rounds it. Blocks avoid a second array of the size of w̄.
        for start in range(0, len(self.wbar_VxD), BLOCK):
            columns = slice(start, start + BLOCK)
            block_BxD = p_CxV[:, columns].T @ weighted_CxD
            if first:
                self.wbar_VxD[columns] = block_BxD
            else:
                self.wbar_VxD[columns] += block_BxD

    def result(self) -> HeadGradients:
        finished = lambda x, unit, like: _times(x, unit).to(x.dtype if self.upcast_wbar else like.dtype)
        bbar_V = None if self.bbar_V is None else finished(self.bbar_V, self.unit, self.bias_V)
        if self.wbar_VxD is None:  # the batch has no rows
            self.wbar_VxD = torch.zeros_like(self.w_VxD, dtype=self.accum)
        if self.vocabulary is not None:
            self.hbar_NxD = self.vocabulary.all_reduce(self.hbar_NxD)
        if self.onto_VxD is None:
            return HeadGradients(self.hbar_NxD, finished(self.wbar_VxD, self.wbar_unit, self.w_VxD), bbar_V)
        if self.wbar_VxD is not self.onto_VxD:
            self.onto_VxD.add_(_times(self.wbar_VxD, self.wbar_unit))
        return HeadGradients(self.hbar_NxD, self.onto_VxD, bbar_V)


def _times(x: Tensor, unit: Tensor | None) -> Tensor:
    return x if unit is None else x.mul_(unit)
