"""What a pass in PyTorch returns, and several passes as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.torch import cotangents
from fsam_core.torch.cotangents import AtTensors
from fsam_core.torch.replay import State


class SavedMicrobatch(NamedTuple):
    """What the second pass needs of a micro-batch: z̄ of each head, its unit, and the state that it began with."""

    cotangents: list[Any]
    unit: Tensor
    state: State | None


class PassResult(NamedTuple):
    """A pass over some micro-batches: their mean loss, their weight, and what was saved of each.

    With several ranks the mean of their losses is the loss over all ranks, and the weight is the ranks' mean.
    """

    loss: Tensor
    weight: Tensor
    saved: list[SavedMicrobatch]

    @classmethod
    def of_one(cls, micro_batch: tuple[Tensor, Tensor, SavedMicrobatch]) -> PassResult:
        """A pass over one micro-batch, from its `head_loss`."""
        loss, weight, saved = micro_batch
        return cls(loss, weight, [saved])


class Replayed(NamedTuple):
    """An earlier pass: what was saved of its micro-batches, and the state that it ended with."""

    saved: Sequence[SavedMicrobatch]
    end: State


def scaled(saved: Sequence[SavedMicrobatch], strength: float) -> list[SavedMicrobatch]:
    """w z̄ in place of z̄."""
    if strength == 1:
        return list(saved)
    return [rescaled(one, torch.full_like(one.unit, strength)) for one in saved]


def shares(first: PassResult, rest: PassResult) -> tuple[Tensor, Tensor]:
    """What each weighs in both together; 0 where both weigh nothing."""
    total = first.weight + rest.weight
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return first.weight / total, rest.weight / total


def merge_results(
    first: PassResult, rest: PassResult, *, saved: bool, of: tuple[Tensor, Tensor] | None = None
) -> PassResult:
    """Both as one pass, with their `shares` if these are known; with `saved`, also what was saved of each."""
    of_first, of_rest = of or shares(first, rest)
    loss, weight = first.loss * of_first + rest.loss * of_rest, first.weight + rest.weight
    if not saved:
        return PassResult(loss, weight, [])
    every = [*(rescaled(k, of_first) for k in first.saved), *(rescaled(k, of_rest) for k in rest.saved)]
    place = len(first.saved)
    every[place] = head_gradient_moved(every[0], every[place])
    return PassResult(loss, weight, every)


def head_gradient_moved(first: SavedMicrobatch, other: SavedMicrobatch) -> SavedMicrobatch:
    """`other` without the heads' own gradients, which are added to those in `first`."""
    found = []
    for total, more in zip(first.cotangents, other.cotangents, strict=True):
        if isinstance(more, AtTensors):
            for x, y in zip(total.shared, more.shared, strict=False):
                x.add_(y)
            more = AtTensors(more.own)
        found.append(more)
    return other._replace(cotangents=found)


def rescaled(saved: SavedMicrobatch, factor: Tensor) -> SavedMicrobatch:
    """The same cotangents as a share of a larger batch, or as those of another strength."""
    zbars = [cotangents.rescaled(zbar, factor) for zbar in saved.cotangents]
    return SavedMicrobatch(zbars, saved.unit / factor, saved.state)
