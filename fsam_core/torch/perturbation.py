"""The perturbed weights in PyTorch: which tensors move, along what, how far."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Perturbed, check_rho
from fsam_core.regions import in_torch
from fsam_core.torch import optimizers, rng
from fsam_core.torch.dtensor import likes, local, local_parts
from fsam_core.torch.passes import Gradients, PassConfig


class StepInputs(NamedTuple):
    """What a method is given for one step.

    Attributes:
        step: completed optimizer steps.
        previous: ĝ of the last step that was taken, for an ascent that remembers it.
        outside: the tensors that the scope leaves alone.
        keeps_correction: whether the correction is wanted by itself, so that g_B is needed of every tensor.
        shares_prefix: whether a `Staged` model's prefix reaches no tensor that moves, by a micro-batch; None without.
    """

    config: PassConfig
    method: Perturbed
    step: int
    clip_norm: float | None
    previous: Gradients
    outside: Set[Any]
    keeps_correction: bool
    shares_prefix: Callable[[Any], bool] | None


class StepResult(NamedTuple):
    """What a method gives: ĝ, and what the passes saw; None for what was not evaluated.

    With several ranks the mean of their losses is the loss over all ranks, the weight is the ranks' mean, and the base
    norm is `Parallel.local_norm`.

    Attributes:
        correction: w (g'_S − g_S), where it was asked for.
    """

    g_hat: Gradients
    loss: Tensor
    moved_loss: Tensor | None
    weight: Tensor
    base_norm: Tensor | None
    length: Tensor | None
    correction: Gradients | None = None


class AscentInputs:
    """See `ascents.AscentInputs`: lists with one tensor for each of `params`."""

    def __init__(self, inputs: StepInputs, params: Sequence[Any], gradients: Gradients | None) -> None:
        self._inputs, self._params, self._gradients = inputs, params, gradients

    @property
    def gradient(self) -> list[Tensor]:
        if self._gradients is None:
            raise UserError("ascent: it looks at the gradient, so its source must be 'full' or 'part', not 'none'")
        return self._of(self._gradients)

    @property
    def momentum(self) -> list[Tensor]:
        states = optimizers.states(self._inputs.config.optimizers, self._params)
        if any(state and "exp_avg" not in state for state in states):
            kinds = ", ".join(type(one).__name__ for one in self._inputs.config.optimizers)
            raise UserError(f"optimizer: this ascent needs one that keeps exp_avg (AdamW), got {kinds}")
        return [_or_zero(state.get("exp_avg"), p) for state, p in zip(states, self._params, strict=True)]

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self._params]

    @property
    def previous(self) -> list[Tensor]:
        return self._of(self._inputs.previous)

    def random(self) -> list[Tensor]:
        return rng.normal(self._params, self._inputs.method.seed, self._inputs.step)

    def map(self, function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
        return [function(*row) for row in zip(*lists, strict=True)]

    def _of(self, gradients: Gradients) -> list[Tensor]:
        return likes(self._params, [_or_zero(gradients.get(p), p) for p in self._params])


def perturb(
    inputs: StepInputs, params: list[Any], gradients: Gradients | None, *, norm: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """(θ + ε for each of params, ‖ε‖₂) along the method's ascent; ε = 0 where that is 0. No wait for a device.

    Copies of masters are written in place, anything else is written beside θ. Of a shard this rank's part is
    returned; the norms are those of the whole.

    Args:
        gradients: what the ascent may look at, None for an ascent that is known before the step.
        norm: `Parallel.local_norm` of the ascent, where it is known.
    """
    config, method = inputs.config, inputs.method
    ops, parallel, copies = config.ops, config.parallel, config.weights.copies
    rho = check_rho(method.rho_at(inputs.step), f"rho({inputs.step})")
    given = method.direction.of(AscentInputs(inputs, params, gradients))
    ascent = local_parts([a.to(p.dtype) for a, p in zip(given, params, strict=True)])
    with in_torch("norm"):
        clip: Tensor | float = 1.0
        if inputs.clip_norm is not None and method.norm != "none":
            local_norm = parallel.local_norm(params, ascent) if norm is None else norm
            clip = (inputs.clip_norm / parallel.norm(local_norm)).clamp(max=1.0)
        v, adam = None, None
        if method.precondition == "adam":
            v, adam = second_moments(ops, method, config.optimizers, params)
        each = method.norm == "per-tensor"
        out = config.weights.destinations(params)
        into = getattr(ops, "direction_and_norm", None)
        if into and v and out and not copies and method.norm in ("l2", "per-tensor") and _are_accumulated(out):
            # The array of the perturbed weights first holds the direction.
            sumsq = square = into(ascent, v, clip=clip, adam=adam, out=out, per_tensor=each)
            ascent, v, adam, clip = out, None, None, 1.0
        else:
            apart = each or parallel.sharded
            if method.direction_of is None:
                sums = ops.preconditioned_norm(ascent, v, clip=clip, adam=adam, per_tensor=apart)
            else:
                scaled = [a * clip for a in ascent]
                ascent, clip = list(map(method.direction_of, map(local, params), scaled)), 1.0
                dots = torch.stack([(d * a).sum() for d, a in zip(ascent, scaled, strict=True)])
                sums = (ops.preconditioned_norm(ascent, per_tensor=apart)[0], dots if apart else dots.sum())
            sumsq, dot = parallel.all_reduce_sums(params, sums, each)
            square = {"dual": dot, "none": torch.ones_like(sumsq)}.get(method.norm, sumsq)
        scale = torch.where(square == 0, 0, rho / torch.where(square == 0, 1, square).sqrt())
        length = (scale.square() * sumsq).sum().sqrt()
    options: dict[str, Any] = {"clip": clip, "adam": adam, "out": out}
    rounding = next((one.rounding for one in config.optimizers if hasattr(one, "rounding")), None)
    if copies and rounding is not None:
        options["rounding"] = rounding._replace(step=inputs.step)
    with in_torch("perturb"):
        return ops.perturb(local_parts(params), ascent, v, scale, **options), length


def in_scope(inputs: StepInputs, params: Sequence[Any]) -> list[Any]:
    """Those of the tensors that the method's scope moves.

    Raises:
        UserError: where there are none.
    """
    found = [p for p in params if p not in inputs.outside]
    if not found:
        raise UserError("scope: none of the parameters it holds got a gradient; is that part of the model frozen?")
    return found


def second_moments(
    ops: ModuleType, method: Perturbed, given: Sequence[torch.optim.Optimizer], params: Sequence[Any]
) -> tuple[list[Tensor], list[Any]]:
    """(AdamW's second moment of each parameter before this step, its settings for the direction).

    Raises:
        UserError: for an optimizer that keeps none.
    """
    current = method.second_moment == "current"
    settings = optimizers.groups(given)
    found, adam = [], []
    for p, state in zip(params, optimizers.states(given, params), strict=True):
        if state and "exp_avg_sq" not in state:
            kinds = ", ".join(type(one).__name__ for one in given)
            raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kinds}")
        found.append(state["exp_avg_sq"] if state else torch.zeros_like(p))
        b2 = float(settings[p]["betas"][1])
        correction = _bias_correction(b2, state.get("step", 0), current)
        adam.append(ops.Adam(b2, float(settings[p]["eps"]), correction, current))
    return local_parts(found), adam


def _bias_correction(b2: float, step: Tensor | float, current: bool) -> Tensor | float:
    """1 − β₂ⁿ for the n steps that the moment has seen, 1 for none. A count that lives on a device stays there."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        n = step.double() + current
        return torch.where(n > 0, 1 - b2**n, 1)
    count = int(step) + current
    return 1 - b2**count if count > 0 else 1.0


def _are_accumulated(tensors: Sequence[Tensor]) -> bool:
    """Whether each has the dtype that directions are computed in."""
    return all(x.dtype == torch.promote_types(x.dtype, torch.float32) for x in tensors)


def _or_zero(x: Tensor | None, like: Any) -> Tensor:
    return torch.zeros_like(like) if x is None else x
