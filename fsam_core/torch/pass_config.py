"""What is the same in every pass of a step in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.heads import of_batch
from fsam_core.split import leaves, with_own_containers
from fsam_core.torch.heads import Head
from fsam_core.torch.parallel import Parallel
from fsam_core.torch.replay import Replay
from fsam_core.torch.weights import Weights
from fsam_kernels.memory import Memory

Features = Callable[[nn.Module, Any], Head]


@contextmanager
def unchanged(tree: Any, who: str, what: str) -> Iterator[None]:
    """A call after which the tensors of a tree must be what they were.

    Raises:
        UserError: where one was written to.
    """
    versions = lambda: [x._version for x in leaves(tree) if isinstance(x, Tensor) and not x.is_inference()]
    before = versions()
    yield
    if versions() != before:
        raise UserError(
            f"{who}: it writes to a tensor of the {what} in place, which the second pass needs; clone it first"
        )


class PassConfig(NamedTuple):
    """What is the same in every pass of a step.

    Attributes:
        ops: the backend's operations.
        params: the optimizers' tensors.
        replay: of random draws and buffers; None where no second pass follows.
        loss_scale: cotangents are multiplied by it, and gradients divided again.
        reduces: whether the ranks' gradients are reduced in each pass; if not, each rank's stay its own.
    """

    ops: ModuleType
    parallel: Parallel
    weights: Weights
    features: Features
    memory: Memory
    params: list[Any]
    optimizers: Sequence[torch.optim.Optimizer]
    replay: Replay | None
    loss_scale: float | Tensor
    reduces: bool

    @property
    def model(self) -> nn.Module:
        """The module that `features` is called with."""
        return self.parallel.inner

    def call_features(self, batch: Any) -> Head:
        """The head of a batch, at the present weights.

        Raises:
            UserError: where `features` writes to the batch's tensors and another pass needs them.
        """
        with nullcontext() if self.replay is None else unchanged(batch, "features", "batch"):
            found = self.parallel.call_features(self.features, with_own_containers(batch))
        return of_batch(found, batch)

    @property
    def joins(self) -> bool:
        """Whether the gradients of two passes can be reduced as one; not if the first pass's are not in `.grad`."""
        return self.reduces and self.parallel.reduces_accumulated and not self.weights.copies and not self.is_scaled

    @property
    def is_scaled(self) -> bool:
        return isinstance(self.loss_scale, Tensor) or self.loss_scale != 1
