"""The passes of a step in PyTorch: losses, gradients and cotangents of micro-batches, returned.

During a pass autograd adds up in `.grad`, where the wrappers of several ranks look for gradients. At its end the pass
takes them from there and returns them, so that between two passes the optimizer's tensors have no `.grad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fsam_core.errors import UserError
from fsam_core.regions import Region, in_torch
from fsam_core.torch import heads, rng
from fsam_core.torch.dtensor import local_parts
from fsam_core.torch.gradients import Gradients, write
from fsam_core.torch.heads import FlatHead, LinearHead, Logits
from fsam_core.torch.parallel import Parallel
from fsam_core.torch.weights import Weights
from fsam_kernels.memory import Memory

Features = Callable[[nn.Module, Any], "LinearHead | Logits"]
FORWARD: dict[str, Region] = {"base": "base forward", "second": "second forward"}
BACKWARD: dict[str, Region] = {"base": "base backward", "second": "second backward"}


class PassConfig(NamedTuple):
    """What is the same in every pass of a step.

    Attributes:
        ops: the backend's operations.
        params: the optimizer's tensors.
        loss_scale: cotangents are multiplied by it, and the masters' gradients divided again.
        reduces: whether the ranks' gradients are reduced in each pass; if not, each rank's stay its own.
    """

    ops: ModuleType
    parallel: Parallel
    weights: Weights
    features: Features
    memory: Memory
    params: list[Any]
    optimizer: torch.optim.Optimizer
    loss_scale: float
    reduces: bool

    @property
    def model(self) -> nn.Module:
        """The module that `features` is called with."""
        return self.parallel.inner

    @property
    def joins(self) -> bool:
        """Whether the gradients of two passes can be reduced as one; not those of masters, which no wrapper sees."""
        return self.reduces and self.parallel.reduces_accumulated and not self.weights.copies


class SavedMicrobatch(NamedTuple):
    """What the second pass needs of a micro-batch: z̄, what it was divided by, and the random state it began with."""

    cotangent: Any
    unit: Tensor
    rng_state: rng.State


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


class GradientSum:
    """The gradients of a pass while it runs: those it starts from, plus what autograd adds.

    Gradients of masters are summed in the masters' dtype, so they are taken from the model's parameters after each
    micro-batch.
    """

    def __init__(self, config: PassConfig, onto: Gradients | None = None) -> None:
        """`onto` is added to in place."""
        clear_gradients(config)
        self._config = config
        self._of_masters = dict(onto or {}) if config.weights.copies else {}
        if onto and not config.weights.copies:
            write(onto)

    def collect(self) -> None:
        """After a micro-batch, add the gradients of the model's parameters to their masters'."""
        for master, p in self._config.weights.copies.items():
            if p.grad is None:
                continue
            upcast = p.grad.to(master.dtype)
            if self._config.loss_scale != 1:
                upcast.mul_(1 / self._config.loss_scale)
            so_far = self._of_masters.get(master)
            self._of_masters[master] = upcast if so_far is None else so_far.add_(upcast)
            p.grad = None

    def take(self) -> Gradients:
        """All of them, out of `.grad`."""
        if self._config.weights.copies:
            return {p: self._of_masters[p] for p in self._config.params if p in self._of_masters}
        having = [p for p in self._config.params if p.grad is not None]
        found = dict(zip(having, local_parts([p.grad for p in having]), strict=True))
        for p in having:
            p.grad = None
        return found


def clear_gradients(config: PassConfig) -> None:
    """No `.grad` in the model or the optimizer."""
    config.model.zero_grad(set_to_none=True)
    config.optimizer.zero_grad(set_to_none=True)


def loss_and_grad(
    config: PassConfig,
    batches: Sequence[Any],
    *,
    cut: str | None = None,
    replay: Sequence[SavedMicrobatch] | None = None,
    region: str = "base",
    reduces: bool = True,
    onto: tuple[Gradients, PassResult] | None = None,
) -> tuple[Gradients, PassResult]:
    """(Jᵀ z̄, loss and z̄) of the micro-batches at the present weights; z̄ is their mean loss's logit cotangent.

    Args:
        cut: where z̄ is saved for another pass: "logits", "hidden" (the cotangents of the head's inputs; those of its
            weight and bias are summed in the first micro-batch's), or None for not at all.
        replay: an earlier pass over the first of these micro-batches, whose random draws are repeated.
        reduces: whether the ranks' gradients are reduced in this pass, if the config says so too.
        onto: an earlier pass and its gradients, which are added to in place: the result is of the micro-batches of
            both, and what the ranks have of them is reduced together.
    """
    sums = GradientSum(config, None if onto is None else onto[0])
    earlier = None if onto is None else onto[1]
    every = _losses(config, batches, sums, cut, replay, region, config.reduces and reduces, earlier)
    gradients = sums.take()
    if config.reduces and reduces and _reduces_after(config, len(batches)):
        config.parallel.all_reduce_mean_(list(gradients.values()))
    result, factor = _merged(config, every, earlier)
    if factor is not None:
        for gradient in gradients.values():
            gradient.mul_(factor.to(gradient))
    return gradients, result


def loss_and_cotangent(
    config: PassConfig,
    batches: Sequence[Any],
    *,
    cut: str | None,
    replay: Sequence[SavedMicrobatch] | None = None,
    region: str = "base",
) -> PassResult:
    """As `loss_and_grad`, without gradients: a forward pass."""
    return _merged(config, _losses(config, batches, None, cut, replay, region, False, None), None)[0]


def vjp(
    config: PassConfig,
    batches: Sequence[Any],
    saved: Sequence[SavedMicrobatch],
    onto: Gradients | None = None,
    strength: float = 1.0,
) -> Gradients:
    """onto + w Jᵀ z̄: the Jacobian at the present weights, cotangents from another pass. No logits, no loss.

    `onto` is added to in place, so the sum takes no pass and no memory of its own. With several ranks the result is the
    mean of that sum over them: `onto` is the same on all, or each rank's own.
    """
    sums = GradientSum(config, onto)
    for i, (batch, one) in enumerate(zip(batches, scaled(saved, strength), strict=True)):
        rng.restore(one.rng_state)
        with _accumulating(config, i, len(batches), config.reduces):
            with in_torch("second forward"):
                head = heads.flat(config.parallel.call_features(config.features, batch))
            with in_torch("second backward"):
                head_vjp(config, head, one.cotangent, sums)
    gradients = sums.take()
    if config.reduces and _reduces_after(config, len(batches)):
        config.parallel.all_reduce_mean_(list(gradients.values()))
    return gradients


# --- one micro-batch --------------------------------------------------------------------------------------------------


def head_loss(
    config: PassConfig,
    head: FlatHead | Logits,
    unit: Tensor | None,
    micro_batches: int,
    rng_state: rng.State,
    *,
    cut: str | None,
    sums: GradientSum | None,
) -> tuple[Tensor, Tensor, SavedMicrobatch]:
    """(loss, weight, z̄) of one of so many micro-batches; its gradients are added to `sums` where there is one."""
    weight = heads.weight(head)
    # Everything is summed in units of the first micro-batch's weight, so that half floats do not overflow; with one
    # micro-batch that is the mean already. With several ranks it is their mean weight, as they average gradients.
    if unit is None:
        mean = config.parallel.mean(weight)
        unit = torch.where(mean > 0, mean, 1)
        weight = mean if micro_batches == 1 else weight
    if cut == "hidden" and isinstance(head, Logits):
        raise UserError("cut: 'hidden' needs features to return a LinearHead, got Logits")
    in_place, so_far = (False, None) if sums is None or config.parallel.hooked else heads.in_place_sum(head)
    loss, cotangent, out = heads.cotangent(
        config.ops,
        head,
        unit / config.loss_scale,
        config.memory,
        gradient=sums is not None or cut == "hidden",
        saved=micro_batches if cut == "logits" else 0,
        onto=None if cut == "hidden" else so_far,  # there the head's own gradient is saved: of this pass alone
    )
    loss = loss / config.loss_scale
    if cut == "hidden":
        cotangent = out
    elif cut is not None:
        cotangent = config.weights.saved_cotangent(cotangent)
    if sums is not None:
        assert out is not None
        heads.backward(head, out, in_place=in_place, donate=cut != "hidden")
        sums.collect()
    return loss, weight, SavedMicrobatch(cotangent, unit, rng_state)


def head_vjp(config: PassConfig, head: FlatHead | Logits, zbar: Any, sums: GradientSum) -> None:
    """Add one micro-batch's Jᵀ z̄ to `sums`."""
    in_place, so_far = (False, None) if config.parallel.hooked else heads.in_place_sum(head)
    out = heads.head_vjp(config.ops, head, zbar, config.memory, so_far)
    heads.backward(head, out, in_place=in_place, donate=not isinstance(zbar, tuple))
    sums.collect()


def _losses(
    config: PassConfig,
    batches: Sequence[Any],
    sums: GradientSum | None,
    cut: str | None,
    replay: Sequence[SavedMicrobatch] | None,
    region: str,
    reduces: bool,
    earlier: PassResult | None,
) -> list[tuple[Tensor, Tensor, SavedMicrobatch]]:
    """`head_loss` of each micro-batch."""
    every: list[tuple[Tensor, Tensor, SavedMicrobatch]] = []
    # The ranks have agreed on the unit of a pass that is replayed.
    replayed = replay[0].unit if replay and config.parallel.count > 1 else None
    unit = replayed if earlier is None else earlier.saved[0].unit
    for i, batch in enumerate(batches):
        if replay is not None and i < len(replay):
            rng.restore(replay[i].rng_state)
        rng_state = rng.state(config.model)
        with _accumulating(config, i, len(batches), reduces, backward=sums is not None):
            with torch.set_grad_enabled(sums is not None), in_torch(FORWARD[region]):
                head = heads.flat(config.parallel.call_features(config.features, batch))
            with in_torch(FORWARD[region] if sums is None else BACKWARD[region]):
                one = head_loss(config, head, unit, len(batches), rng_state, cut=cut, sums=sums)
        unit = one[2].unit
        if cut == "hidden" and every:
            one = (*one[:2], _head_gradient_moved(every[0][2], one[2]))
        every.append(one)
    return every


def _accumulating(
    config: PassConfig, i: int, count: int, reduces: bool, backward: bool = True
) -> AbstractContextManager[None]:
    """Micro-batch i of a pass over so many; the gradients of all are reduced with the last one's, or after it."""
    more = not reduces or _reduces_after(config, count) or i + 1 < count
    return config.parallel.accumulating(backward and more)


def _reduces_after(config: PassConfig, count: int) -> bool:
    """Whether the ranks' gradients are reduced after a pass over so many micro-batches, and not by the wrapper.

    Masters get theirs after each micro-batch, so they are not in `.grad` when the last one is reduced.
    """
    can_stay_local = config.parallel.hooked and not config.parallel.why_not_local
    return bool(config.weights.copies) and count > 1 and can_stay_local


# --- several micro-batches --------------------------------------------------------------------------------------------


def scaled(saved: Sequence[SavedMicrobatch], strength: float) -> list[SavedMicrobatch]:
    """w z̄ in place of z̄."""
    if strength == 1:
        return list(saved)
    return [_rescaled(one, torch.full_like(one.unit, strength)) for one in saved]


def shares(first: PassResult, rest: PassResult) -> tuple[Tensor, Tensor]:
    """What each weighs in both together."""
    total = first.weight + rest.weight
    safe = torch.where(total > 0, total, 1)
    return first.weight / safe, rest.weight / safe


def with_rest(
    config: PassConfig, rest: Sequence[Any], g_S: Gradients, base_S: PassResult, cut: str | None = None
) -> tuple[Gradients, PassResult]:
    """(g_B, the pass over the whole batch), from that over S; with `cut`, cotangents are saved of all of it."""
    g_B, base_rest = loss_and_grad(config, rest, cut=cut)
    of_S, of_rest = shares(base_S, base_rest)
    for p, g in g_B.items():
        if p in g_S:
            g.lerp_(g_S[p], of_S.to(g))  # one pass: the shares add up to 1, or every gradient is 0
        else:
            g.mul_(of_rest.to(g))
    g_B |= {p: g * of_S.to(g) for p, g in g_S.items() if p not in g_B}
    ordered = {p: g_B[p] for p in config.params if p in g_B}
    return ordered, merge_results(base_S, base_rest, saved=cut is not None)


def merge_results(first: PassResult, rest: PassResult, *, saved: bool) -> PassResult:
    """Both as one pass; with `saved`, also their cotangents."""
    of_first, of_rest = shares(first, rest)
    loss, weight = first.loss * of_first + rest.loss * of_rest, first.weight + rest.weight
    if not saved:
        return PassResult(loss, weight, [])
    every = [*(_rescaled(k, of_first) for k in first.saved), *(_rescaled(k, of_rest) for k in rest.saved)]
    place = len(first.saved)
    if len(every) > 1 and isinstance(every[-1].cotangent, tuple) and len(every[place].cotangent) > 1:
        every[place] = _head_gradient_moved(every[0], every[place])
    return PassResult(loss, weight, every)


def _merged(
    config: PassConfig, every: Sequence[tuple[Tensor, Tensor, SavedMicrobatch]], earlier: PassResult | None
) -> tuple[PassResult, Tensor | None]:
    """(the micro-batches as one pass, with those of an earlier one; the factor of its gradients, None for 1)."""
    losses, weights, saved = zip(*every, strict=True)
    if len(every) == 1 and earlier is None:
        return PassResult.of_one(every[0]), None
    total = config.parallel.mean(torch.stack(weights).sum())
    if earlier is not None:
        losses, total = (earlier.loss, *losses), earlier.weight + total
    factor = saved[0].unit / torch.where(total > 0, total, 1)
    return PassResult(torch.stack(losses).sum() * factor, total, [_rescaled(k, factor) for k in saved]), factor


def _head_gradient_moved(first: SavedMicrobatch, other: SavedMicrobatch) -> SavedMicrobatch:
    """`other` without the head's own gradient, which is added to that in `first`."""
    for total, more in zip(first.cotangent[1:], other.cotangent[1:], strict=True):
        total.add_(more)
    return other._replace(cotangent=other.cotangent[:1])


def _rescaled(saved: SavedMicrobatch, factor: Tensor) -> SavedMicrobatch:
    """The same cotangent as a share of a larger batch, or as one of another strength."""
    z = saved.cotangent
    if isinstance(z, tuple):
        z = tuple(x.mul_(factor.to(x)) for x in z)
    elif isinstance(z, Tensor):
        z = z * factor.to(z)
    elif z is not None:
        z = dataclasses.replace(z, weights_N=z.weights_N * factor.to(z.weights_N))
    return SavedMicrobatch(z, saved.unit / factor, saved.rng_state)


def flatten(batch: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, tree = _pytree.tree_flatten(batch)
    return leaves, lambda leaves: _pytree.tree_unflatten(leaves, tree)
