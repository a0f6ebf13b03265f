"""The passes of a step in PyTorch: losses, gradients and cotangents of micro-batches, returned.

During a pass autograd adds up in `.grad`, where the wrappers of several ranks look for gradients. At its end the pass
takes them from there and returns them, so that between two passes the optimizer's tensors have no `.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fsam_core.errors import UserError
from fsam_core.heads import check_outputs
from fsam_core.regions import Region, in_torch
from fsam_core.torch import cotangents, heads
from fsam_core.torch.cotangents import AtTensors, Pairs
from fsam_core.torch.gradient_sum import GradientSum, WeightSum
from fsam_core.torch.gradients import Gradients, scale
from fsam_core.torch.heads import Flat, FlatHead
from fsam_core.torch.pass_config import PassConfig
from fsam_core.torch.pass_result import (
    PassResult,
    Replayed,
    SavedMicrobatch,
    head_gradient_moved,
    merge_results,
    rescaled,
    scaled,
    shares,
)
from fsam_core.torch.replay import State
from fsam_core.torch.scope import names_of

FORWARD: dict[str, Region] = {"base": "base forward", "second": "second forward"}
BACKWARD: dict[str, Region] = {"base": "base backward", "second": "second backward"}


def check_context() -> None:
    """Check that passes can take gradients here, each at its own weights.

    Raises:
        UserError: in `torch.inference_mode`, and in `parametrize.cached`.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("a step takes gradients, which torch.inference_mode() cannot; call it outside")
    if parametrize._cache_enabled:
        raise UserError(
            "a step has other weights in its second pass, and parametrize.cached() would keep those of the first; call "
            "the step outside, and cached() in features"
        )


def restore(config: PassConfig, state: State | None) -> None:
    """The random state and the buffers that a micro-batch began with in the base pass."""
    assert config.replay is not None
    assert state is not None
    config.replay.restore(state)


def loss_and_grad(
    config: PassConfig,
    batches: Sequence[Any],
    *,
    cut: str | None = None,
    replay: Replayed | None = None,
    region: str = "base",
    reduces: bool = True,
    onto: tuple[Gradients, PassResult] | None = None,
) -> tuple[Gradients, PassResult]:
    """(Jᵀ z̄, loss and z̄) of the micro-batches at the present weights; z̄ is their mean loss's logit cotangent.

    Args:
        cut: where z̄ is saved for another pass: "logits", "hidden" (the cotangents of the head's inputs; those of its
            weight and bias are summed in the first micro-batch's), or None for not at all.
        replay: an earlier pass over the first of these micro-batches, whose random draws and buffers are repeated.
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
        scale(gradients.values(), factor)
    return gradients, result


def loss_and_cotangent(
    config: PassConfig,
    batches: Sequence[Any],
    *,
    cut: str | None,
    replay: Replayed | None = None,
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
        restore(config, one.state)
        with _accumulating(config, i, len(batches), config.reduces):
            with in_torch("second forward"):
                found = heads.flat(config.call_features(batch), "not")
            with in_torch("second backward"):
                head_vjp(config, found, one.cotangents, sums)
    gradients = sums.take()
    if config.reduces and _reduces_after(config, len(batches)):
        config.parallel.all_reduce_mean_(list(gradients.values()))
    return gradients


# --- one micro-batch --------------------------------------------------------------------------------------------------


def head_loss(
    config: PassConfig,
    found: Flat,
    unit: Tensor | None,
    micro_batches: int,
    state: State | None,
    *,
    cut: str | None,
    sums: GradientSum | None,
) -> tuple[Tensor, Tensor, SavedMicrobatch]:
    """(loss, weight, z̄) of one of so many micro-batches; its gradients are added to `sums` where there is one."""
    weight = found[0].count
    # Everything is summed in units of the first micro-batch's weight, so that half floats do not overflow; with one
    # micro-batch that is the mean already. With several ranks it is their mean weight, as they average gradients.
    if unit is None:
        mean = config.parallel.mean(weight)
        unit = torch.where(mean > 0, mean, 1)  # the first may have no targets, and others some
        weight = mean if micro_batches == 1 else weight
    linear = sum(isinstance(head, FlatHead) for head in found)
    if cut == "hidden" and not linear:
        raise UserError("cut: 'hidden' needs features to return a LinearHead; use cut='logits'")
    if cut is not None:
        check_outputs(x.ndim for head in found for x in head.tensors)
    losses, saved, roots = [], [], Pairs()
    for place, (head, divisor) in enumerate(zip(found, cotangents.divisors(found, unit), strict=True)):
        cuts_hidden = cut == "hidden" and isinstance(head, FlatHead)
        of_weight = WeightSum() if sums is None else sums.of_weight(head)
        try:
            loss, zbar, out = cotangents.cotangent(
                config.ops,
                head,
                divisor / config.loss_scale if config.is_scaled else divisor,
                config.memory,
                gradient=sums is not None or cuts_hidden,
                saved=micro_batches * linear if cut == "logits" else 0,
                # With a cut there the head's own gradient is saved: of this pass alone, in the weight's dtype.
                onto=None if cuts_hidden else of_weight.onto,
                upcast=of_weight.upcast and not cuts_hidden,
            )
        except cotangents.ReachesMore as error:
            names = names_of(config.model, {})
            raise cotangents.ReachesMore(error.reached, names.get(error.reached[0], "")) from None
        losses.append(loss / config.loss_scale if config.is_scaled else loss)
        if cut is not None:
            at_hidden = AtTensors(out[:1], out[1:]) if cuts_hidden and out else None
            saved.append(at_hidden or config.weights.saved_cotangent(zbar, place))
        if sums is not None:
            assert out is not None
            donate = cut is None or not (cuts_hidden or isinstance(zbar, AtTensors))
            roots += cotangents.pairs(head, out, add_weight=of_weight.add, donate=donate)
    if sums is not None:
        cotangents.backward(roots)
        sums.collect()
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return total, weight, SavedMicrobatch(saved, unit, state)


def head_vjp(config: PassConfig, found: Flat, zbars: Sequence[Any], sums: GradientSum) -> None:
    """Add one micro-batch's Jᵀ z̄ to `sums`."""
    roots = Pairs()
    for head, zbar in zip(found, zbars, strict=True):
        of_weight = sums.of_weight(head)
        out = cotangents.head_vjp(config.ops, head, zbar, config.memory, of_weight.onto, of_weight.upcast)
        donate = not isinstance(zbar, AtTensors)
        if config.parallel.hooked and not donate:
            # The head's own gradient is in the first micro-batch, and a wrapper's hooks wait for one in each.
            out = (*out, *(x.new_zeros(()).expand_as(x) for x in head.tensors[len(out) :]))
        roots += cotangents.pairs(head, out, add_weight=of_weight.add, donate=donate)
    cotangents.backward(roots)
    sums.collect()


def _losses(
    config: PassConfig,
    batches: Sequence[Any],
    sums: GradientSum | None,
    cut: str | None,
    replay: Replayed | None,
    region: str,
    reduces: bool,
    earlier: PassResult | None,
) -> list[tuple[Tensor, Tensor, SavedMicrobatch]]:
    """`head_loss` of each micro-batch."""
    every: list[tuple[Tensor, Tensor, SavedMicrobatch]] = []
    # The ranks have agreed on the unit of a pass that is replayed.
    replayed = replay.saved[0].unit if replay is not None and config.parallel.count > 1 else None
    unit = replayed if earlier is None else earlier.saved[0].unit
    for i, batch in enumerate(batches):
        if replay is not None and i <= len(replay.saved):
            restore(config, replay.saved[i].state if i < len(replay.saved) else replay.end)
        state = None if config.replay is None else config.replay.state()
        with _accumulating(config, i, len(batches), reduces, backward=sums is not None):
            with torch.set_grad_enabled(sums is not None), in_torch(FORWARD[region]):
                found = heads.flat(config.call_features(batch))
            with in_torch(FORWARD[region] if sums is None else BACKWARD[region]):
                one = head_loss(config, found, unit, len(batches), state, cut=cut, sums=sums)
        unit = one[2].unit
        if cut == "hidden" and every:
            one = (*one[:2], head_gradient_moved(every[0][2], one[2]))
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


def with_rest(
    config: PassConfig,
    rest: Sequence[Any],
    g_S: Gradients,
    base_S: PassResult,
    cut: str | None = None,
    saved: bool = False,
) -> tuple[Gradients, PassResult]:
    """(g_B, the pass over the whole batch), from that over S; with `saved`, with what a pass over all of it needs."""
    g_B, base_rest = loss_and_grad(config, rest, cut=cut)
    of_S, of_rest = shares(base_S, base_rest)
    both = [p for p in g_B if p in g_S]
    if both:  # one pass: the shares add up to 1, or every gradient is 0
        config.ops.lerp_([g_B[p] for p in both], [g_S[p] for p in both], of_S)
    scale([g for p, g in g_B.items() if p not in g_S], of_rest)
    g_B |= {p: g * of_S.to(g) for p, g in g_S.items() if p not in g_B}
    ordered = {p: g_B[p] for p in config.params if p in g_B}
    return ordered, merge_results(base_S, base_rest, saved=saved, of=(of_S, of_rest))


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
    # It is rounded to the gradients' dtype, so without any targets it is 1 and nothing larger.
    factor = saved[0].unit / torch.where(total > 0, total, 1)
    return PassResult(torch.stack(losses).sum() * factor, total, [rescaled(k, factor) for k in saved]), factor
