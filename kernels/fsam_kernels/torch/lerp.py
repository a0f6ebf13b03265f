"""x + share (y − x) over a list of tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def lerp_(x: Sequence[Tensor], y: Sequence[Tensor], share: Tensor) -> None:
    """x ← x + share (y − x), in place.

    PyTorch's list operation takes one share for each tensor, and on a GPU launches a kernel for each.

    Args:
        x, y: tensors of equal shapes; at least one.
        share: a scalar tensor, rounded to the dtype of each tensor.
    """
    shares = {kind: share.to(*kind) for kind in {(each.device, each.dtype) for each in x}}
    torch._foreach_lerp_(list(x), list(y), [shares[each.device, each.dtype] for each in x])
