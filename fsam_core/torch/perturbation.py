"""The perturbed weights in PyTorch: which tensors move, along what, how far."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Perturbed, check_rho
from fsam_core.regions import in_torch
from fsam_core.torch import optimizers, rng
from fsam_core.torch.dtensor import likes, local, local_parts
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.pass_config import PassConfig
from fsam_kernels.torch.direction import accum_dtype


class StepInputs(NamedTuple):
    """What a method is given for one step.

    Attributes:
        completed: () -> completed optimizer steps; where these are on the device, the host waits for them.
        previous: what the ascent remembers of the last step that was taken.
        norms: ‖a‖ and the divisor of ε over c of that step, for norm_from="previous"; 0 before the first.
        outside: the tensors that the scope leaves alone.
        keeps_correction: whether the correction is wanted by itself, so that g_B is needed of every tensor.
        shares_prefix: whether a `Staged` model's prefix reaches no tensor that moves, by a micro-batch; None without.
    """

    config: PassConfig
    method: Perturbed
    completed: Callable[[], int]
    clip_norm: float | None
    previous: Gradients
    norms: Tensor
    outside: Set[Any]
    keeps_correction: bool
    shares_prefix: Callable[[Any], bool] | None

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.completed()


class Perturbation(NamedTuple):
    """What is known of a perturbation besides θ + ε.

    Attributes:
        length: ‖ε‖₂; where there are norms its `Parallel.local_norm`.
        norms: of this step, for the next: `Parallel.local_norm`s of a and of the divisor of ε over c.
        divisor: what ε was divided by, over c, where that is the last step's.
        memory: of an ascent with a memory of its own.
    """

    length: Tensor
    norms: tuple[Tensor, Tensor] | None = None
    divisor: Tensor | None = None
    memory: Gradients | None = None


class StepResult(NamedTuple):
    """What a method gives: ĝ, and what the passes saw; None for what was not evaluated.

    With several ranks the mean of their losses is the loss over all ranks, the weight is the ranks' mean, and the base
    norm is `Parallel.local_norm`.

    Attributes:
        correction: what the next steps reuse, where it was asked for.
    """

    g_hat: Gradients
    loss: Tensor
    moved_loss: Tensor | None
    weight: Tensor
    base_norm: Tensor | None
    epsilon: Perturbation | None
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

    @cached_property
    def memory(self) -> list[Tensor]:
        remembers = self._inputs.method.direction.remembers
        if not callable(remembers):
            raise UserError("ascent: it has no memory of its own; give it one as `remembers`")
        return remembers(self)

    def random(self) -> list[Tensor]:
        return rng.normal(self._params, self._inputs.method.seed, self._inputs.step)

    def map(self, function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
        return [function(*row) for row in zip(*lists, strict=True)]

    def _of(self, gradients: Gradients) -> list[Tensor]:
        return likes(self._params, [_or_zero(gradients.get(p), p) for p in self._params])


def perturb(
    inputs: StepInputs, params: list[Any], gradients: Gradients | None, *, norm: Tensor | None
) -> tuple[list[Tensor], Perturbation]:
    """θ + ε for each of params along the method's ascent; ε = 0 where that is 0. No wait for a device.

    Copies of masters are written in place, anything else is written beside θ. Of a shard this rank's part is
    returned; the norms are those of the whole.

    Args:
        gradients: what the ascent may look at, None for an ascent that is known before the step.
        norm: `Parallel.local_norm` of the ascent, where it is known.
    """
    config, method = inputs.config, inputs.method
    ops, parallel, copies = config.ops, config.parallel, config.weights.copies
    step = inputs.step if callable(method.rho) else 0
    rho = check_rho(method.rho_at(step), f"rho({step})")
    seen = AscentInputs(inputs, params, gradients)
    parts = lambda given: local_parts([a.to(p.dtype) for a, p in zip(given, params, strict=True)])
    ascent = parts(method.direction.of(seen))
    memory = None
    if callable(method.direction.remembers):
        # Copies: it may be the gradient itself, whose arrays the correction is added to.
        memory = {p: x.clone() for p, x in zip(params, parts(seen.memory), strict=True)}
    last = None
    if method.norm_from == "previous":
        last = inputs.norms.to(ascent[0].device, accum_dtype(ascent[0].dtype))
    with in_torch("norm"):
        clip: Tensor | float = 1.0
        local_norm = norm
        if inputs.clip_norm is not None and method.norm != "none":
            local_norm = parallel.local_norm(params, ascent) if norm is None else norm
            clip = (inputs.clip_norm / (parallel.norm(local_norm) if last is None else last[0])).clamp(max=1.0)
        used = clip
        v, adam = None, None
        if method.needs_v:
            v, adam = second_moments(ops, method, config.optimizers, params)
        each = method.norm == "per-tensor"
        out = config.weights.destinations(params)
        into = getattr(ops, "direction_and_norm", None)
        plain = method.direction_of is None and method.norm in ("l2", "per-tensor") and not copies
        if into and v and out and plain and _are_accumulated(out):
            # The array of the perturbed weights first holds the direction.
            sumsq = square = into(ascent, v, clip=clip, adam=adam, out=out, per_tensor=each)
            ascent, v, adam, clip = out, None, None, 1.0
        else:
            apart = each or parallel.sharded
            if method.direction_of is None:
                sums = ops.preconditioned_norm(ascent, v, clip=clip, adam=adam, per_tensor=apart)
            else:
                scaled = [a * clip for a in ascent]
                v_hat = scaled if v is None or adam is None else list(map(_v_hat, scaled, v, adam))
                ascent = list(map(method.direction_of, map(local, params), scaled, v_hat))
                v, adam, clip = None, None, 1.0
                dots = torch.stack([(d * a).sum() for d, a in zip(ascent, scaled, strict=True)])
                sums = (ops.preconditioned_norm(ascent, per_tensor=apart)[0], dots if apart else dots.sum())
            if last is None:
                sumsq, dot = parallel.all_reduce_sums(params, sums, each)
            else:
                # Nothing is reduced before the second pass; the norms of the parts go with those of the step.
                sumsq, dot = (parallel.local_norm(params, x.sqrt().reshape(-1).unbind()).square() for x in sums)
            square = {"dual": dot}.get(method.norm, torch.ones_like(sumsq) if method.norm == "none" else sumsq)
        divisor = square.sqrt() if last is None else last[1] * used
        scale = (rho / divisor).masked_fill(divisor == 0, 0)
        length = (scale.square() * sumsq).sum().sqrt()
        epsilon = Perturbation(length, memory=memory)
        if last is not None:
            norms = (length.new_zeros(()) if local_norm is None else local_norm, square.sqrt() / used)
            epsilon = epsilon._replace(norms=norms, divisor=last[1])
    options: dict[str, Any] = {"clip": clip, "adam": adam, "out": out}
    rounding = next((one.rounding for one in config.optimizers if hasattr(one, "rounding")), None)
    if copies and rounding is not None and rounding.stochastic:
        options["rounding"] = rounding._replace(step=inputs.step)
    with in_torch("perturb"):
        return ops.perturb(local_parts(params), ascent, v, scale, **options), epsilon


def _v_hat(a: Tensor, v: Tensor, adam: Any) -> Tensor:
    """The bias-corrected second moment, with the ascent folded in where that is the method's choice."""
    v = v.to(accum_dtype(v.dtype))
    return (v.lerp(a.to(v).square(), 1 - adam.b2) if adam.current else v) / adam.correction


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
    found, b2s, steps = [], [], []
    for p, state in zip(params, optimizers.states(given, params), strict=True):
        if state and "exp_avg_sq" not in state:
            kinds = ", ".join(type(one).__name__ for one in given)
            raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kinds}")
        found.append(state["exp_avg_sq"] if state else torch.zeros_like(p))
        b2s.append(float(settings[p]["betas"][1]))
        steps.append(state.get("step", 0))
    corrections = _bias_corrections(b2s, steps, current)
    each = zip(params, b2s, corrections, strict=True)
    return local_parts(found), [ops.Adam(b2, float(settings[p]["eps"]), x, current) for p, b2, x in each]


def _bias_corrections(b2s: Sequence[float], steps: Sequence[Tensor | float], current: bool) -> Sequence[Tensor | float]:
    """1 − β₂ⁿ for the n steps that each moment has seen, 1 for none. Counts that live on a device stay there."""
    device = next((t.device for t in steps if isinstance(t, Tensor) and t.device.type != "cpu"), None)
    if device is None:
        tensors = iter(torch.stack([t for t in steps if isinstance(t, Tensor)] or [torch.zeros(())]).tolist())
        counts = [int(next(tensors) if isinstance(t, Tensor) else t) + current for t in steps]
        return [1 - b2**n if n > 0 else 1.0 for b2, n in zip(b2s, counts, strict=True)]
    n = torch.stack([torch.as_tensor(t, device=device) for t in steps]).double() + current
    b2: Any = b2s[0] if len(set(b2s)) == 1 else torch.tensor(b2s, dtype=torch.float64).to(device, non_blocking=True)
    correction = 1 - b2**n
    return (correction if current else correction.add_(n == 0)).unbind()


def _are_accumulated(tensors: Sequence[Tensor]) -> bool:
    """Whether each has the dtype that directions are computed in."""
    return all(x.dtype == accum_dtype(x.dtype) for x in tensors)


def _or_zero(x: Tensor | None, like: Any) -> Tensor:
    return torch.zeros_like(like) if x is None else x
