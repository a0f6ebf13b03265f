"""The mean loss of a model with the step's head, for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core import backends
from fsam_core.heads import of_batch
from fsam_core.torch import cotangents, heads
from fsam_core.torch.parallel import detect_parallelism
from fsam_core.torch.pass_config import Features
from fsam_kernels.memory import AUTO, Memory


def mean_loss(
    features: Features, *, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> mean loss with the same head, for evaluation: no gradient, no N×V tensor.

    For a model in DistributedDataParallel or under `fully_shard` it is the mean over the batches of all ranks, and all
    ranks must call it.
    """
    ops = backends.load("torch", backend)

    @torch.no_grad()
    def loss(model: nn.Module, batch: Any) -> Tensor:
        parallel = detect_parallelism(model)
        found = heads.flat(of_batch(parallel.call_features(features, batch), batch))
        weight = parallel.mean(found[0].count)
        unit = torch.where(weight > 0, weight, 1)
        every = zip(found, cotangents.divisors(found, unit), strict=True)
        losses = [cotangents.cotangent(ops, head, by, memory, gradient=False)[0] for head, by in every]
        return parallel.mean(torch.stack(losses).sum())

    return loss
