"""A head whose vocabulary is cut over ranks: what they tell each other of a row, and the sum that is its h̄.

Each rank has all rows and consecutive columns, none of which it sends. From the logits of its columns it makes a `Part`
of each row's figures, three or four floats; all parts are gathered and `combined` on every rank alike. P of its columns
then gives its own rows of w̄ whole, and a share of h̄, which is summed once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fsam_kernels.options import Loss
from fsam_kernels.torch.softmax_stats import Part, Rows, combined, finite, wide

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13


@dataclass(frozen=True)
class Vocabulary:
    """The ranks that hold a head's columns together, and which of them this one holds.

    Attributes:
        group: their process group.
        size: V, the columns of all ranks.
        start: the first column held here.
        widest: the columns of the rank with most. Chunks are as for these on every rank, since each chunk is a
            collective; how many are held here says the weight itself, and there may be none.
    """

    group: Any
    size: int
    start: int
    widest: int

    def labels(self, labels_N: Tensor, columns: int) -> Tensor:
        """Labels as of the columns held here: `columns`, which none of them has, for one of another rank's.

        Raises:
            IndexError: from PyTorch, for a label ≥ V; on a GPU an assertion of the device's.
        """
        labels_N.new_empty(()).expand(self.size)[labels_N.clamp_min(0)]  # a look-up for the error it raises
        here_N = labels_N - self.start
        held_N = (here_N >= 0) & (here_N < columns)
        return torch.where(labels_N < 0, labels_N, torch.where(held_N, here_N, columns))

    def of_part(self, loss: Loss, columns: int) -> Loss:
        """The loss whose floor in these columns is s/V of the whole, all that a cotangent's entries know of V."""
        return dataclasses.replace(loss, label_smoothing=loss.label_smoothing * columns / self.size)

    def rows(self, part: Part, labels_C: Tensor, loss: Loss) -> Rows:
        """The rows' figures, from this rank's part of them; `labels_C` as of `labels`.

        loss, lse and target are the row's. top and scale go with exp(z − top) of the part, as `Rows` goes with that of
        a whole row: scale exp(z − top) is the same at either top.
        """
        sent_KxC = torch.stack([x_C for x_C in part if x_C is not None])
        every_PKxC = sent_KxC.new_empty(dist.get_world_size(self.group) * len(sent_KxC), sent_KxC.shape[1])
        _gather(every_PKxC, sent_KxC, group=self.group)
        parts = every_PKxC.unflatten(0, (-1, len(sent_KxC))).unbind(1)
        row, (top_C, *_) = combined(Part(*parts), labels_C, loss, self.size), part
        # A part of nothing but −inf weighs exp(−inf) = 0.
        return row._replace(top_C=finite(top_C), scale_C=row.scale_C * (top_C - row.top_C).exp())

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, taken in float32 or wider, in x's dtype and the same on all to the bit."""
        whole = x.to(wide(x))
        dist.all_reduce(whole, group=self.group)
        return whole.to(x.dtype)
