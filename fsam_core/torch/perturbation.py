"""The perturbed weights in PyTorch: which tensors move, along what, how far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Perturbed, check_rho
from fsam_core.regions import in_torch
from fsam_core.torch import rng
from fsam_core.torch.parallel import like, local
from fsam_core.torch.passes import Passes


class Seen:
    """See `ascents.Seen`: lists with one tensor for each of `params`."""

    def __init__(
        self,
        params: Sequence[Any],
        optimizer: torch.optim.Optimizer,
        gradients: dict[Any, Tensor] | None,
        previous: dict[Any, Tensor],
        seed: int,
        step: int,
    ) -> None:
        self._params, self._optimizer, self._gradients, self._previous = params, optimizer, gradients, previous
        self._seed, self._step = seed, step

    @property
    def gradient(self) -> list[Tensor]:
        if self._gradients is None:
            raise UserError("ascent: it looks at the gradient, so its source must be 'full' or 'part', not 'none'")
        return [like(p, _or_zero(self._gradients.get(p), p)) for p in self._params]

    @property
    def momentum(self) -> list[Tensor]:
        states = [self._optimizer.state.get(p, {}) for p in self._params]
        if any(state and "exp_avg" not in state for state in states):
            kind = type(self._optimizer).__name__
            raise UserError(f"optimizer: this ascent needs one that keeps exp_avg (AdamW), got {kind}")
        return [_or_zero(state.get("exp_avg"), p) for state, p in zip(states, self._params, strict=True)]

    @property
    def previous(self) -> list[Tensor]:
        return [_or_zero(self._previous.get(p), p) for p in self._params]

    def random(self) -> list[Tensor]:
        return rng.normal(self._params, self._seed, self._step)

    def map(self, function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
        return [function(*row) for row in zip(*lists, strict=True)]


def perturbed(
    ops: ModuleType,
    method: Perturbed,
    passes: Passes,
    params: list[Any],
    ascent: list[Tensor],
    *,
    norm: Tensor | None,
    clip_norm: float | None,
    step: int,
) -> tuple[list[Tensor], Tensor]:
    """(θ + ε for each of params, ‖ε‖₂); ε = 0 where the ascent is 0. Nothing here waits for a device.

    `norm` is `Ranks.norm_here` of a where it is known. Compute copies of masters are written in place, everything else
    beside θ. Of what is sharded this rank's part is given and returned; the norms are those of the whole.
    """
    rho = check_rho(method.rho_at(step), f"rho({step})")
    ranks = passes.ranks
    with in_torch("norm"):
        ascent = [local(a) for a in ascent]
        clip: Tensor | float = 1.0
        if clip_norm is not None:
            here = ranks.norm_here(params, ascent) if norm is None else norm
            clip = (clip_norm / ranks.norm(here)).clamp(max=1.0)
        v, adam = moments(ops, method, passes.optimizer, params) if method.precondition == "adam" else (None, None)
        each = method.norm == "per-tensor"
        out = [passes.copies[p].data for p in params] if passes.copies else passes.room_for(params)
        into = getattr(ops, "direction_and_norm", None)
        if into and v and out and not passes.copies and method.norm != "dual" and _wide(out):
            # The perturbed weights' room holds the direction meanwhile.
            sumsq = square = into(ascent, v, clip=clip, adam=adam, out=out, per_tensor=each)
            ascent, v, adam, clip = out, None, None, 1.0
        else:
            sums = ops.preconditioned_norm(ascent, v, clip=clip, adam=adam, per_tensor=each or ranks.sharded)
            sumsq, dot = ranks.sums(params, sums, each)
            square = dot if method.norm == "dual" else sumsq
        scale = torch.where(square == 0, 0, rho / torch.where(square == 0, 1, square).sqrt())
        length = (scale.square() * sumsq).sum().sqrt()
    options: dict[str, Any] = {"clip": clip, "adam": adam, "out": out}
    rounding = getattr(passes.optimizer, "rounding", None)
    if passes.copies and rounding is not None:
        options["rounding"] = rounding._replace(step=step)
    with in_torch("perturb"):
        return ops.perturb([local(p) for p in params], ascent, v, scale, **options), length


def moments(
    ops: ModuleType, method: Perturbed, optimizer: torch.optim.Optimizer, params: Sequence[Any]
) -> tuple[list[Tensor], list[Any]]:
    """(AdamW's second moment of each parameter before this step, its settings for the direction)."""
    current = method.second_moment == "current"
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    found, adam = [], []
    for p in params:
        state = optimizer.state.get(p, {})
        if state and "exp_avg_sq" not in state:
            kind = type(optimizer).__name__
            raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kind}")
        found.append(local(state["exp_avg_sq"]) if state else torch.zeros_like(local(p)))
        b2 = float(settings[p]["betas"][1])
        correction = _bias_correction(b2, state.get("step", 0), current)
        adam.append(ops.Adam(b2, float(settings[p]["eps"]), correction, current))
    return found, adam


def _bias_correction(b2: float, step: Tensor | float, current: bool) -> Tensor | float:
    """1 − β₂ⁿ for the n steps that the moment has seen, 1 for none. A count that lives on a device stays there."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        n = step.double() + current
        return torch.where(n > 0, 1 - b2**n, 1)
    count = int(step) + current
    return 1 - b2**count if count > 0 else 1.0


def _wide(tensors: Sequence[Tensor]) -> bool:
    """Whether each is of the dtype that directions are computed in."""
    return all(x.dtype == torch.promote_types(x.dtype, torch.float32) for x in tensors)


def _or_zero(x: Tensor | None, like: Any) -> Tensor:
    return torch.zeros_like(like) if x is None else x
