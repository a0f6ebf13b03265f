"""A head whose vocabulary is sharded over ranks: the exchange of row statistics, and the all-reduce of h̄.

Each rank has all rows and a range of consecutive columns. It computes `PartialStats` from the logits of its columns,
three or four floats a row. The ranks gather all of these and combine them, so that every rank has the same `RowStats`.
P of a rank's columns gives its own rows of w̄, complete, and one summand of h̄, which is all-reduced once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fsam_kernels.options import Loss
from fsam_kernels.torch.softmax_stats import PartialStats, RowStats, accum_dtype, combine_partials, finite_top

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13


@dataclass(frozen=True)
class Vocabulary:
    """The ranks that share a head's columns, and this rank's range.

    Attributes:
        group: their process group.
        size: V, the columns of all ranks together.
        start: the first column of this rank. The weight's rows give the number of its columns, which may be 0.
        widest: the largest number of columns on any rank. It determines the chunks on every rank, because each chunk
            is a collective.
    """

    group: Any
    size: int
    start: int
    widest: int

    def labels(self, labels_N: Tensor, columns: int) -> Tensor:
        """Labels relative to this rank's columns; `columns`, which is out of range, for another rank's label.

        Raises:
            IndexError: from PyTorch, for a label ≥ V; on a GPU a device-side assertion.
        """
        labels_N.new_empty(()).expand(self.size)[labels_N.clamp_min(0)]  # an index that raises the error
        here_N = labels_N - self.start
        held_N = (here_N >= 0) & (here_N < columns)
        return torch.where(labels_N < 0, labels_N, torch.where(held_N, here_N, columns))

    def local_loss(self, loss: Loss, columns: int) -> Loss:
        """The loss with the same s/V over `columns` columns; a cotangent's entries depend on V in no other way."""
        return dataclasses.replace(loss, label_smoothing=loss.label_smoothing * columns / self.size)

    def all_gather_stats(self, partial: PartialStats, labels_C: Tensor, loss: Loss) -> RowStats:
        """The rows' statistics from this rank's partial ones; `labels_C` as returned by `labels`.

        loss, lse and target are those of the whole row. top is this rank's own, and scale is adapted to it:
        scale exp(z − top) is the same for either top.
        """
        sent_KxC = torch.stack([x_C for x_C in partial if x_C is not None])
        every_PKxC = sent_KxC.new_empty(dist.get_world_size(self.group) * len(sent_KxC), sent_KxC.shape[1])
        _gather(every_PKxC, sent_KxC, group=self.group)
        parts = every_PKxC.unflatten(0, (-1, len(sent_KxC))).unbind(1)
        row, (top_C, *_) = combine_partials(PartialStats(*parts), labels_C, loss, self.size), partial
        # A rank whose logits are all −inf has the weight exp(−inf) = 0.
        return row._replace(top_C=finite_top(top_C), scale_C=row.scale_C * (top_C - row.top_C).exp())

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, taken in float32 or float64, in x's dtype and bit-identical on all ranks."""
        whole = x.to(accum_dtype(x))
        dist.all_reduce(whole, group=self.group)
        return whole.to(x.dtype)
