"""The fused AdamW update of a list of tensors, and an optimizer whose checkpoints are those of torch.optim.AdamW.

PyTorch's fused kernel does the arithmetic. It takes whole tensors where it supports them. Otherwise it works piece by
piece, so that what it cannot do (clipping, bfloat16 moments or weights, a rounded copy) finds its data in the cache.
Either way memory sees 4 reads and 3 writes an element, and the write of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.direction import Scratch, as_clip, entries, pieces
from fsam_kernels.torch.rounding import Rounding


class Update(NamedTuple):
    """AdamW's settings for one tensor, as in torch.optim.AdamW; `step` is the number of this step, from 1."""

    lr: float | Tensor
    b1: float
    b2: float
    eps: float
    weight_decay: float
    step: float | Tensor


@torch.no_grad()
def adamw(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    settings: Sequence[Update],
    *,
    clip: Tensor | float = 1.0,
    copy: Sequence[Tensor] | None = None,
    rounding: Rounding = rounds.NEAREST,
) -> None:
    """One step of AdamW in place, in float32 arithmetic (float64 for float64 weights).

        m ← β₁ m + (1 − β₁) c g,   v ← β₂ v + (1 − β₂) (c g)²,   θ ← (1 − lr λ) θ − lr m̂ / (sqrt(v̂) + ε)

    Args:
        theta, exp_avg, exp_avg_sq: weights and moments, each float32, bfloat16 or float16; updated in place.
        g: gradients, not modified.
        settings: one for each tensor.
        clip: the factor c of gradient clipping, a number or a scalar tensor; the host does not wait for it.
        copy: the compute copies, to which the new weights are also written, rounded once from float32.
        rounding: how bfloat16 results are rounded, to nearest or at random.

    Raises:
        ValueError: for lists of different lengths, or different shapes of one weight's tensors.
    """
    if len(settings) != len(theta):
        raise ValueError(f"settings: one for each of the {len(theta)} tensors is needed, got {len(settings)}")
    scratch, clip = Scratch(), as_clip(clip)
    steps: dict[Any, Tensor] = {}
    whole: dict[Any, list[tuple[Any, ...]]] = {}
    # `entries` wants the arrays that are written last.
    for entry in entries((g, copy, theta, exp_avg, exp_avg_sq), written=4 if copy is not None else 3):
        grad, rounded, weight, m, v = entry.arrays
        if not weight.numel():
            continue
        accum = torch.promote_types(weight.dtype, torch.float32)
        one = settings[entry.place]
        step = _step(one.step, weight.device, steps)
        key = (one._replace(step=0), weight.device, accum)
        clipped = isinstance(clip, Tensor) or clip != 1
        if rounded is None and not clipped and {x.dtype for x in (weight, grad, m, v)} == {accum}:
            whole.setdefault(key, []).append((weight, grad, m, v, step))
            continue
        at = 0
        for grad, rounded, weight, m, v in pieces(entry.arrays):
            given = dict(zip(("theta", "exp_avg", "exp_avg_sq"), (weight, m, v), strict=True))
            used = {name: x if x.dtype == accum else scratch(name, x, accum).copy_(x) for name, x in given.items()}
            scaled = grad if grad.dtype == accum else scratch("gradient", grad, accum).copy_(grad)
            if clipped:
                factor = clip.to(scaled) if isinstance(clip, Tensor) else clip
                scaled = torch.mul(scaled, factor, out=scratch("gradient", grad, accum))
            _fused([(used["theta"], scaled, used["exp_avg"], used["exp_avg_sq"], step)], one)
            for name, x in given.items():
                if x is not used[name]:
                    rounds.write(x, used[name], rounding, entry.place, at, name)
            if rounded is not None:
                rounds.write(rounded, used["theta"], rounding, entry.place, at, "copy")
            at += grad.numel()
    for key, tensors in whole.items():
        _fused(tensors, key[0])


def _step(step: float | Tensor, device: torch.device, cache: dict[Any, Tensor]) -> Tensor:
    """The step as the fused kernel takes it: a float32 scalar on the weights' device, one for each value."""
    if isinstance(step, Tensor):
        return step.to(device, torch.float32)
    if (step, device) not in cache:
        cache[step, device] = torch.tensor(float(step)).to(device, non_blocking=True)
    return cache[step, device]


def _fused(tensors: Sequence[tuple[Tensor, ...]], one: Update) -> None:
    weights, grads, m, v, steps = (list(x) for x in zip(*tensors, strict=True))
    torch._fused_adamw_(
        weights, grads, m, v, [], steps, lr=one.lr, beta1=one.b1, beta2=one.b2, weight_decay=one.weight_decay,
        eps=one.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW by `adamw`, with a dtype for the moments, a compute copy, and clipping in the same pass.

    State names, step counts and parameter groups are those of torch.optim.AdamW, so a `state_dict` of either loads into
    the other. The step count is on the host, as it is there by default; one that a checkpoint loads onto a device stays
    there.

    Attributes:
        copies: weight -> tensor of its shape, to which every step also writes the new weight.
        rounding: how bfloat16 results are rounded; its `step` is set to the state's at each step.
    """

    update: Callable[..., None] = staticmethod(adamw)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        rounding: Rounding = rounds.NEAREST,
    ) -> None:
        """
        Args:
            state_dtype: dtype of the moments; None for each weight's own.
            copies, rounding: see the attributes.
        """
        super().__init__(params, lr, betas, eps, weight_decay)
        self.state_dtype, self.copies, self.rounding = state_dtype, dict(copies or {}), rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, clip: Tensor | float = 1.0) -> Any:
        """Take a step with `clip` times the gradients.

        Raises:
            ValueError: for amsgrad or maximize in a group from a checkpoint, for copies of only some of the weights
                that have a gradient, and for random rounding with step counts on a device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists: tuple[list[Any], ...] = ([], [], [], [], [])
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("param_groups: this AdamW knows neither amsgrad nor maximize; use torch.optim.AdamW")
            b1, b2 = map(float, group["betas"])
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(p)
                    state["step"] += 1
                    t = state["step"] if state["step"].device.type != "cpu" else float(state["step"])
                    update = Update(group["lr"], b1, b2, group["eps"], group["weight_decay"], t)
                    one = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], update)
                    for column, x in zip(lists, one, strict=True):
                        column.append(x)
        if lists[0]:
            type(self).update(*lists, clip=clip, copy=self._copies(lists[0]), rounding=self._rounding(lists[4]))
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)
        return state

    def _copies(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        if not self.copies:
            return None
        missing = sum(p not in self.copies for p in params)
        if missing:
            raise ValueError(f"copies: {missing} of {len(params)} weights with a gradient have none; give all, or none")
        return [self.copies[p] for p in params]

    def _rounding(self, updates: Sequence[Update]) -> Rounding:
        if not self.rounding.stochastic:
            return self.rounding
        steps = [one.step for one in updates]
        if any(isinstance(t, Tensor) for t in steps):
            raise ValueError("rounding: at random needs step counts on the host, got one on a device")
        return self.rounding._replace(step=int(max(steps)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but moments keep `state_dtype` where one is given.

        PyTorch casts loaded moments to the weights' dtype, so float32 moments of bfloat16 weights would lose bits.
        """
        super().load_state_dict(state_dict)
        if self.state_dtype is None:
            return
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, mine, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state_dict["state"].get(i, {}):
                    value = state_dict["state"][i][name]
                    self.state[p][name] = value.to(p.device, self.state_dtype, copy=True)
