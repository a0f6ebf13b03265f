"""The methods in PyTorch: ĝ = g_B + w (g'_S − g_S), with no more passes than each of its forms needs.

Gradients are dictionaries by tensor, returned by the passes and not left in `.grad`. What is added to a gradient is
added in place, so the sums hold no arrays of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fsam_core import split
from fsam_core.torch import passes, staged
from fsam_core.torch.gradients import (
    Gradients,
    add_correction,
    add_weighted,
    base_minus_correction,
    clone_if_reused,
    combine,
    difference,
    divide,
    local_norm,
    scale,
    with_gradient,
)
from fsam_core.torch.pass_result import PassResult, Replayed, SavedMicrobatch, merge_results, rescaled, shares
from fsam_core.torch.perturbation import Perturbation, StepInputs, StepResult, in_scope, perturb


def corrected(inputs: StepInputs, batches: Sequence[Any], *, local: bool = False) -> StepResult:
    """ĝ of these micro-batches, and what was seen on the way.

    Args:
        local: each rank's own gradients are corrected, as if there were no others (the config must not reduce them),
            and then averaged.
    """
    form = _each_micro_batch if inputs.method.direction.source == "micro" else _corrected
    result = form(inputs, list(batches))
    if local:
        memory = result.epsilon.memory if result.epsilon else None
        averaged = [x for of in (result.g_hat, result.correction, memory) for x in (of or {}).values()]
        inputs.config.parallel.all_reduce_mean_(averaged)
    return result


def _corrected(inputs: StepInputs, batches: list[Any]) -> StepResult:
    config, method = inputs.config, inputs.method
    w, ascent, exact = method.strength, method.direction, method.exact
    part, rest = split.split(batches, method.cut_at, _pytree.tree_map)
    if method.form == "split":
        return _split(inputs, part, rest)
    if inputs.shares_prefix and staged.is_shared(inputs, part, rest):
        return staged.corrected(inputs, part[0], rest)
    if exact and ascent.known:
        return _with_known_ascent(inputs, part)
    whole = method.fraction == 1  # S = B

    g_S, g_B, base_S, base = _base(inputs, part, rest)
    S, saved = ([*part, *rest], base.saved) if whole else (part, base_S.saved)
    params = with_gradient(g_B)
    scope = in_scope(inputs, params)
    base_norm = local_norm(config.parallel, scope if exact else params, g_B)
    ascends = {"full": g_B, "part": g_S, "micro": g_S, "none": None}[ascent.source]
    norm = base_norm if ascent.name == "full" and len(scope) == len(params) else None
    moved, epsilon = perturb(inputs, scope, ascends, norm=norm)

    if whole:
        g_S = g_B
    to_combine = clone_if_reused(config.parallel, g_B) if method.combine else None
    of_B = {p: g.clone() for p, g in g_B.items()} if inputs.keeps_correction else None
    onto = {} if exact else base_minus_correction(config.parallel, g_B, g_S, w)
    del g_S, g_B, ascends  # freed before the second pass makes its own
    g_hat, second = _second(inputs, scope, moved, S, saved, onto)
    if to_combine is not None and method.combine is not None:
        combine(config.parallel, to_combine, g_hat, method.combine)
    moved_loss = second.loss if second else None
    weight = second.weight if second and whole and rest else base.weight
    change = None if of_B is None else _correction(inputs, g_hat, of_B)
    return StepResult(g_hat, base.loss, moved_loss, weight, base_norm, epsilon, change)


def _correction(inputs: StepInputs, g_hat: Gradients, g_B: Gradients) -> Gradients:
    """What the next steps reuse, in the arrays of g_B."""
    if (reuse := inputs.method.reuse) is None:
        return difference(g_hat, g_B)
    combine(inputs.config.parallel, g_hat, g_B, lambda mm, gm, gg: reuse.store(gg, gm, mm)[::-1])
    return g_B


def _base(inputs: StepInputs, part: list[Any], rest: list[Any]) -> tuple[Gradients, Gradients, PassResult, PassResult]:
    """(g_S, g_B, the pass over the part, that over the whole batch).

    Of the exact method along the ascent of a part, g_B is that of the part, and the rest is evaluated for its z̄ alone.
    """
    config, method = inputs.config, inputs.method
    whole = method.fraction == 1
    cut = method.cut if method.path == "functional" else None
    joins = bool(rest) and not whole and method.direction.source != "part" and method.path != "sam" and config.joins
    g_S, base_S = passes.loss_and_grad(config, part, cut=cut, reduces=not joins)
    if joins:  # g_S and the gradient of the rest in one reduction, and g'_S − g_S in the other
        own = {p: g.clone() for p, g in g_S.items()}
        g_B, base = passes.loss_and_grad(config, rest, onto=(g_S, base_S))
        return own, g_B, base_S, base
    if rest and not method.exact:
        g_S = clone_if_reused(config.parallel, g_S)
        g_B, base = passes.with_rest(config, rest, g_S, base_S, cut=cut if whole else None, saved=whole)
        return g_S, g_B, base_S, base
    if rest and cut is not None:
        base_rest = passes.loss_and_cotangent(config, rest, cut=cut)
        return g_S, g_S, base_S, merge_results(base_S, base_rest, saved=True)
    return g_S, g_S, base_S, base_S


def _second(
    inputs: StepInputs,
    scope: list[Any],
    moved: list[Tensor],
    S: list[Any],
    saved: Sequence[SavedMicrobatch],
    onto: Gradients,
) -> tuple[Gradients, PassResult | None]:
    """(onto + w g'_S, the pass at θ+ε where it evaluates a loss)."""
    config, method = inputs.config, inputs.method
    w, weights = method.strength, config.weights
    assert config.replay is not None
    # Where the second pass is the first to see some micro-batches, their draws and buffers count.
    with config.replay.replayed(counts=len(saved) < len(S)) as end:
        if method.path == "functional":  # J(θ+ε)ᵀ z̄(θ)
            with weights.at(scope, moved):
                return passes.vjp(config, S, saved, onto, w), None
        if method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
            with weights.at(scope, moved):
                g_moved, second = passes.loss_and_grad(config, S, replay=Replayed(saved, end), region="second")
            return add_correction(onto, g_moved, w), second
        with weights.at(scope, moved):  # J(θ)ᵀ z̄(θ+ε)
            second = passes.loss_and_cotangent(config, S, cut="logits", replay=Replayed(saved, end), region="second")
        weights.sync_from_masters()
        return passes.vjp(config, S, second.saved, onto, w), second


def _split(inputs: StepInputs, S: list[Any], R: list[Any]) -> StepResult:
    """(|R| g_R + |S| g'_S) / |B|, whose second pass accumulates onto g_R: no third gradient is held."""
    config, method = inputs.config, inputs.method
    functional, known = method.path == "functional", method.direction.known
    # Nothing waits for g_R along a known ascent, so both gradients are reduced together.
    joins = known and config.joins
    base_S = passes.loss_and_cotangent(config, S, cut=method.cut) if functional else None
    g_R, base_R = passes.loss_and_grad(config, R, reduces=not joins)
    params = with_gradient(g_R)
    scope = in_scope(inputs, params)
    base_norm = None if known else local_norm(config.parallel, params, g_R)
    norm = base_norm if method.direction.name == "rest" and len(scope) == len(params) else None
    moved, epsilon = perturb(inputs, scope, None if known else g_R, norm=norm)
    onto = clone_if_reused(config.parallel, g_R)
    if base_S is not None:
        of_S, of_R = shares(base_S, base_R)
        base = merge_results(base_S, base_R, saved=False, of=(of_S, of_R))
        scale(onto.values(), of_R)
        saved = [rescaled(one, of_S) for one in base_S.saved]
        assert config.replay is not None
        with config.replay.replayed(), config.weights.at(scope, moved):
            g_hat = passes.vjp(config, S, saved, onto)
        return StepResult(g_hat, base.loss, None, base.weight, base_norm, epsilon)
    with config.weights.at(scope, moved):
        g_hat, both = passes.loss_and_grad(config, S, onto=(onto, base_R), region="second")
    weight_S = both.weight - base_R.weight
    moved_loss = (both.loss * both.weight - base_R.loss * base_R.weight) / torch.where(weight_S > 0, weight_S, 1)
    return StepResult(g_hat, base_R.loss, moved_loss, both.weight, base_norm, epsilon)


def _with_known_ascent(inputs: StepInputs, batches: list[Any]) -> StepResult:
    """The exact method along an ascent known before the step, which needs no gradient at θ."""
    config, method = inputs.config, inputs.method
    scope = in_scope(inputs, [p for p in config.params if p.requires_grad])
    moved, epsilon = perturb(inputs, scope, None, norm=None)
    if method.path == "functional":
        base = passes.loss_and_cotangent(config, batches, cut=method.cut)
        g_hat, _ = _second(inputs, scope, moved, batches, base.saved, {})
        with_gradient(g_hat)
        return StepResult(g_hat, base.loss, None, base.weight, None, epsilon)
    if method.path == "sam":
        with config.weights.at(scope, moved):
            g_hat, base = passes.loss_and_grad(config, batches)
    else:
        with config.weights.at(scope, moved):
            base = passes.loss_and_cotangent(config, batches, cut="logits")
        config.weights.sync_from_masters()
        assert config.replay is not None
        with config.replay.replayed():
            g_hat = passes.vjp(config, batches, base.saved)
    with_gradient(g_hat)
    return StepResult(g_hat, base.loss, base.loss, base.weight, None, epsilon)


def _each_micro_batch(inputs: StepInputs, batches: list[Any]) -> StepResult:
    """Each micro-batch corrected along its own gradient; the mean of them, each by its weight."""
    config = inputs.config
    every: list[StepResult] = []
    total: Gradients = {}
    for batch in batches:
        one = _corrected(inputs, [batch])
        config.weights.sync_from_masters()
        add_weighted(total, clone_if_reused(config.parallel, one.g_hat), one.weight)
        assert one.base_norm is not None
        base_norm = config.parallel.norm(one.base_norm)
        every.append(one._replace(g_hat={}, base_norm=base_norm))
    weights = torch.stack([one.weight for one in every])
    weight = weights.sum()
    safe = torch.where(weight > 0, weight, 1)
    divide(total.values(), safe)

    def mean(values: Sequence[Any]) -> Any:
        return None if values[0] is None else (torch.stack(list(values)) * (weights / safe)).sum()

    loss, moved_loss = (mean([getattr(one, x) for one in every]) for x in ("loss", "moved_loss"))
    epsilon = Perturbation(mean([one.epsilon.length for one in every if one.epsilon]))
    base_norm = config.parallel.local_share(mean([one.base_norm for one in every]))
    return StepResult(total, loss, moved_loss, weight, base_norm, epsilon)
