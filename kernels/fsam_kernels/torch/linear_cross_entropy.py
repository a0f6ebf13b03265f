"""Cross entropy of a linear head, and the logit cotangent in a form that can be applied more than once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fsam_kernels.memory import BLOCK, chunk_rows, default_chunk_bytes
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.softmax_stats import Rows, SoftmaxOps, wide
from fsam_kernels.torch.vocabulary import Vocabulary

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Cotangent:
    """z̄ = weights P, in a form that any head can be pulled back through, more than once.

    P_v = scale exp(z_v − top) − s/V off the target and P_y = target, with z from (h, W, b). Either what P is recomputed
    from is held, N·D + 5N values (the head weight is the parameter's own storage), or P itself (`kept_NxV`) in the
    dtype of h, which is what the matrix products would round it to anyway, and the head is None.

    Of a vocabulary over ranks all of it is of the columns held here: their P, and labels, top, scale and loss that say
    so (`Vocabulary`).
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

    def rows(self, rows: slice) -> Rows:
        """The figures of some rows; loss and lse are not kept, and not needed any more."""
        top_C = self.top_N[rows]
        return Rows(top_C, top_C, top_C, self.scale_N[rows], self.target_N[rows])


class HeadGradients(NamedTuple):
    """The cotangents of a head's hidden states, weight and bias (None where it has none)."""

    hbar_NxD: Tensor
    wbar_VxD: Tensor
    bbar_V: Tensor | None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Its own dtype, or autocast's where that is on for its device."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def outside_autograd(function: Callable[P, T]) -> Callable[P, T]:
    """Without a graph, and without an outer autocast: these functions choose their dtypes themselves."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> T:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(device, enabled=False):
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
    wide_wbar: bool = False,
    onto_VxD: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    chunk_bytes: int | None = None,
    softmax: SoftmaxOps = plain,
) -> tuple[Tensor, Tensor, Cotangent, HeadGradients | None]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n, it pulled back through this same head or None).

    With `gradient` the head's gradients are formed while a chunk's logits exist, which saves the ordinary backward pass
    one matrix product. Formulas in `spec.linear_cross_entropy` and `spec.logit_vjp`.

    Args:
        h_NxD: last hidden states, any float dtype; the products are taken in it.
        w_VxD: head weight; a head stored as [D, V] is given as its transposed view. Given in float32 beside a narrower
            h, w̄ comes back as it was summed, not rounded.
        labels_N: int64; a negative one makes its row ignored.
        weights_N: weight of each row in the mean, already divided by its normaliser.
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        keep: hold P for a second pull-back: N·V values in the dtype of h, and one matrix product less there.
        wide_wbar: return w̄ and b̄ as they were summed, in float32, and not in the dtypes of w and b.
        onto_VxD: what w̄ is added to, in place, by the matrix products themselves; it is then returned as w̄. Of the
            dtype that w̄ is summed in.
        vocabulary: the ranks that W's columns of logits are cut over; w, b, w̄ and b̄ are then this rank's rows, and
            all else, labels included, is the same on every rank. They send three floats a row and rank (four with label
            smoothing) in each chunk, and h̄ once. None for the whole of W here.
        chunk_bytes: rows are taken in chunks whose working tensors fill at most this much (one row at the least), so
            that no N×V tensor is ever whole; None for the device's default. It changes nothing beyond rounding.
        softmax: the work between the matrix products: the `softmax_stats` module of a backend.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input); h̄, w̄ and b̄ in the dtypes of h, w and b, each summed
        over chunks in float32.

    Raises:
        RuntimeError, IndexError: from PyTorch, for a label ≥ V.
    """
    h_NxD, w_VxD = h_NxD.detach(), w_VxD.detach()
    bias_V = None if bias_V is None else bias_V.detach()
    here = loss
    if vocabulary is not None:
        labels_N, here = vocabulary.labels(labels_N, len(w_VxD)), vocabulary.of_part(loss, len(w_VxD))
    weights_N = torch.where(labels_N >= 0, weights_N, 0).to(wide(h_NxD))
    figures = Rows(*(h_NxD.new_empty(len(h_NxD), dtype=wide(h_NxD)) for _ in Rows._fields))
    kept_NxV = softmax.empty_chunk(len(h_NxD), len(w_VxD), h_NxD) if keep else None
    total = Sums(h_NxD, w_VxD, bias_V, weights_N, wide_wbar, onto_VxD, vocabulary) if gradient else None
    base = product(w_VxD, bias_V, h_NxD.dtype, softmax)

    def one(rows: slice) -> None:  # a function, so that a chunk's tensors are gone before the next one's are made
        u_CxV, labels_C = base(h_NxD[rows]), labels_N[rows]
        if vocabulary is None:
            row, e_CxV = softmax.statistics(u_CxV, labels_C, loss)
        else:
            part, e_CxV = softmax.part(u_CxV, labels_C, loss)
            row = vocabulary.rows(part, labels_C, loss)
        for of_all, of_chunk in zip(figures, row, strict=True):
            of_all[rows] = of_chunk
        if kept_NxV is not None:
            p_CxV = kept_NxV[rows]
        else:
            p_CxV = e_CxV if e_CxV.dtype == u_CxV.dtype else u_CxV
            if p_CxV is u_CxV and loss.soft_cap is not None:
                p_CxV = softmax.empty_chunk(len(u_CxV), u_CxV.shape[1], u_CxV)
        if keep or total is not None:
            softmax.cotangent(e_CxV, row, labels_C, here, p_CxV)
        if total is not None:
            if loss.soft_cap is not None:
                p_CxV = p_CxV.clone() if keep else p_CxV
                softmax.through_cap_(p_CxV, u_CxV, loss.soft_cap)
            total.add(p_CxV, rows)

    for rows in chunks(h_NxD, w_VxD, loss, chunk_bytes, vocabulary):
        one(rows)
    h, w, b = (None, None, None) if keep else (h_NxD, w_VxD, bias_V)
    _, _, top_N, scale_N, target_N = figures
    cotangent = Cotangent(h, w, b, top_N, scale_N, target_N, labels_N, weights_N, kept_NxV, here, vocabulary)
    return figures.loss_C, figures.lse_C, cotangent, None if total is None else total.result()


def chunks(
    h_NxD: Tensor, w_VxD: Tensor, loss: Loss, chunk_bytes: int | None, vocabulary: Vocabulary | None = None
) -> list[slice]:
    """Slices of rows whose working tensors stay within `chunk_bytes` (one row at the least)."""
    columns = len(w_VxD) if vocabulary is None else vocabulary.widest
    budget = default_chunk_bytes(h_NxD.device.type) if chunk_bytes is None else chunk_bytes
    rows = chunk_rows(columns, h_NxD.element_size(), wide(h_NxD).itemsize, loss, budget)
    return [slice(start, start + rows) for start in range(0, len(h_NxD), rows)]


def product(
    w_VxD: Tensor, bias_V: Tensor | None, dtype: torch.dtype, softmax: SoftmaxOps
) -> Callable[[Tensor], Tensor]:
    """h -> u = h Wᵀ + b in `dtype`; the weight is cast once, however many chunks there are."""
    w_DxV, bias_V = w_VxD.to(dtype).T, None if bias_V is None else bias_V.to(dtype)

    def logits(h_CxD: Tensor) -> Tensor:
        u_CxV = softmax.empty_chunk(len(h_CxD), w_DxV.shape[1], h_CxD)
        if bias_V is None:
            return torch.mm(h_CxD, w_DxV, out=u_CxV)
        return torch.addmm(bias_V, h_CxD, w_DxV, out=u_CxV)

    return logits


class Sums:
    """h̄ = weights (P W), and w̄ = Pᵀ (weights h), b̄ = Pᵀ weights, summed chunk by chunk in float32 or float64.

    Of a vocabulary over ranks h̄ is the sum over all of them.

    Row weights are applied on the narrow side, D values a row and not V. In half floats that is relative to the
    largest: 1/N times a probability is below what they hold.
    """

    def __init__(
        self,
        h_NxD: Tensor,
        w_VxD: Tensor,
        bias_V: Tensor | None,
        weights_N: Tensor,
        wide_wbar: bool,
        onto_VxD: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.wide_wbar, self.vocabulary = wide_wbar, vocabulary
        self.h_NxD, self.w_VxD, self.bias_V, self.weights_N = h_NxD, w_VxD, bias_V, weights_N
        self.unit: Tensor | None = None
        if h_NxD.dtype != wide(h_NxD) and len(weights_N):
            largest = weights_N.abs().max()
            self.unit = torch.where(largest > 0, largest, 1)
        self.cast_VxD = w_VxD.to(h_NxD.dtype)
        self.hbar_NxD = torch.empty_like(h_NxD)
        self.onto_VxD = onto_VxD
        if onto_VxD is not None and onto_VxD.dtype != wide(h_NxD):
            raise ValueError(f"onto_VxD: w̄ is summed in {wide(h_NxD)}, got a tensor of {onto_VxD.dtype}")
        # Without a unit the products themselves go on from what is there; with one, it is a factor of their sum.
        self.wbar_VxD = onto_VxD if self.unit is None else None
        self.bbar_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide(h_NxD))

    def add(self, p_CxV: Tensor, rows: slice) -> None:
        """Contract one chunk's P with its head."""
        h_CxD, weights_C = self.h_NxD[rows], self.weights_N[rows]
        p_CxV = p_CxV.to(h_CxD.dtype)
        torch.mm(p_CxV, self.cast_VxD, out=self.hbar_NxD[rows])
        self.hbar_NxD[rows].mul_(weights_C[:, None])
        relative_C = (weights_C if self.unit is None else weights_C / self.unit).to(h_CxD.dtype)
        weighted_CxD = h_CxD * relative_C[:, None]
        first = self.wbar_VxD is None
        if self.wbar_VxD is None:  # not filled with zeros: new pages cost what an eighth of the product does
            self.wbar_VxD = torch.empty_like(self.w_VxD, dtype=wide(h_CxD))
        if self.unit is None and first:
            torch.mm(p_CxV.T, weighted_CxD, out=self.wbar_VxD)
        elif self.unit is None:
            self.wbar_VxD.addmm_(p_CxV.T, weighted_CxD)
        else:
            # A library sums one product in float32 and rounds it; by blocks, so that it is not a whole w̄ beside w̄.
            for start in range(0, len(self.wbar_VxD), BLOCK):
                columns = slice(start, start + BLOCK)
                of_chunk = p_CxV[:, columns].T @ weighted_CxD
                if first:
                    self.wbar_VxD[columns] = of_chunk
                else:
                    self.wbar_VxD[columns] += of_chunk
        if self.bbar_V is not None:
            self.bbar_V += p_CxV.T @ relative_C

    def result(self) -> HeadGradients:
        scaled = lambda x, like: self._times_unit(x).to(x.dtype if self.wide_wbar else like.dtype)
        bbar_V = None if self.bbar_V is None else scaled(self.bbar_V, self.bias_V)
        if self.wbar_VxD is None:  # there was no row
            self.wbar_VxD = torch.zeros_like(self.w_VxD, dtype=wide(self.h_NxD))
        if self.vocabulary is not None:
            self.hbar_NxD = self.vocabulary.summed(self.hbar_NxD)
        if self.onto_VxD is None:
            return HeadGradients(self.hbar_NxD, scaled(self.wbar_VxD, self.w_VxD), bbar_V)
        if self.wbar_VxD is not self.onto_VxD:
            self.onto_VxD.add_(self._times_unit(self.wbar_VxD))
        return HeadGradients(self.hbar_NxD, self.onto_VxD, bbar_V)

    def _times_unit(self, x: Tensor) -> Tensor:
        return x if self.unit is None else x.mul_(self.unit)
