"""Random tensors that depend on a seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsam_core.torch.dtensor import shard_like


def normal(like: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Standard normal tensors, drawn from (seed, step) alone; of a DTensor's, this rank's part of the same."""
    generators: dict[torch.device, torch.Generator] = {}
    drawn = []
    for x in like:
        if x.device not in generators:
            words = torch.tensor([seed, step]).mul_(torch.tensor([0x9E3779B1, 0x85EBCA77])).sum()
            generators[x.device] = torch.Generator(x.device).manual_seed(int(words) % 2**63)
        kind = torch.promote_types(x.dtype, torch.float32)
        whole = torch.randn(x.shape, generator=generators[x.device], dtype=kind, device=x.device)
        drawn.append(shard_like(x, whole))
    return drawn
