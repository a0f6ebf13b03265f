"""Counts what PyTorch's process groups send."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts the collectives of the process groups, and the bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            tensors = [x for x in torch.utils._pytree.tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            size = sum(x.nbytes for x in tensors)
            name = "scalar" if size <= 64 else name
            self.counts[name] += 1
            self.bytes[name] += size
        return function(*args, **(kwargs or {}))
