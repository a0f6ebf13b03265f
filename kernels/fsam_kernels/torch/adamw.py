"""The fused AdamW update of a list of tensors, and an optimizer whose checkpoints are those of torch.optim.AdamW.

PyTorch's fused kernel does the arithmetic. It takes whole tensors where it supports them. Otherwise it works piece by
piece, so that what it cannot do (clipping, bfloat16 moments or weights, a rounded copy) finds its data in the cache.
Either way memory sees 4 reads and 3 writes an element, and the write of the copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.direction import SMALL, Scratch, accum_dtype, as_clip, entries, pieces
from fsam_kernels.torch.rounding import Rounding

HOST = torch.device("cpu")


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
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW in place, in float32 arithmetic (float64 for float64 weights).

        m ← β₁ m + (1 − β₁) c g,   v ← β₂ v + (1 − β₂) (c g)²,   θ ← (1 − lr λ) θ − lr m̂ / (sqrt(v̂) + ε)

    Args:
        theta, exp_avg, exp_avg_sq: weights and moments, each float32, bfloat16 or float16; updated in place.
        g: gradients. On a GPU PyTorch's kernel may write c g to them; a CPU does not modify them.
        settings: one for each tensor.
        clip: the factor c of gradient clipping, a number or a scalar tensor; the host does not wait for it.
        copy: the compute copies, to which the new weights are also written, rounded once from float32.
        rounding: how bfloat16 results are rounded, to nearest or at random.
        found_inf: a float32 scalar on the weights' device, or None for 0. Where it is 1 nothing is updated, and the
            copies are written from the weights as they are; the host does not wait for it.

    Raises:
        ValueError: for lists of different lengths, or different shapes of one weight's tensors.
    """
    if len(settings) != len(theta):
        raise ValueError(f"settings: one for each of the {len(theta)} tensors is needed, got {len(settings)}")
    scratch, clip = Scratch(), as_clip(clip)
    clipped = isinstance(clip, Tensor) or clip != 1
    scales: dict[torch.device, Tensor] = {}
    steps: dict[Any, Tensor] = {}
    whole: dict[Any, list[tuple[Any, ...]]] = {}
    # `entries` wants the arrays that are written last.
    for entry in entries((g, copy, theta, exp_avg, exp_avg_sq), written=4 if copy is not None else 3):
        grad, rounded, weight, m, v = entry.arrays
        if not weight.numel():
            continue
        accum, home = accum_dtype(weight.dtype), weight.device
        one = settings[entry.place]
        step = _step(one.step, home, steps)
        same = weight.dtype == grad.dtype == m.dtype == v.dtype == accum
        # The kernel divides float32 gradients by a scale, and PyTorch's list operations write the copies.
        beside = rounded is None and (not clipped or (home.type == "cpu" and weight.numel() <= SMALL))
        on_gpu = home.type != "cpu" and not rounding.stochastic and (accum == torch.float32 or not clipped)
        if same and (beside or on_gpu):
            whole.setdefault((one._replace(step=0), home, accum), []).append((weight, grad, m, v, step, rounded))
            continue
        at = 0
        for grad, rounded, weight, m, v in pieces(entry.arrays):
            given = dict(zip(("theta", "exp_avg", "exp_avg_sq"), (weight, m, v), strict=True))
            used = {name: x if x.dtype == accum else scratch(name, x, accum).copy_(x) for name, x in given.items()}
            scaled = grad if grad.dtype == accum else scratch("gradient", grad, accum).copy_(grad)
            if clipped:
                factor = clip.to(scaled) if isinstance(clip, Tensor) else clip
                scaled = torch.mul(scaled, factor, out=scratch("gradient", grad, accum))
            arrays = (used["theta"], scaled, used["exp_avg"], used["exp_avg_sq"], step)
            _fused([[x] for x in arrays], one, found_inf)
            for name, x in given.items():
                if x is not used[name]:
                    rounds.write(x, used[name], rounding, entry.place, at, name)
            if rounded is not None:
                rounds.write(rounded, used["theta"], rounding, entry.place, at, "copy")
            at += grad.numel()
    for (one, home, _), tensors in whole.items():
        weights, grads, *moments, steps_, rounded = (list(x) for x in zip(*tensors, strict=True))
        if clipped and home.type == "cpu":
            grads = list(torch._foreach_mul(grads, clip))
        elif clipped and home not in scales:  # what the gradients are divided by
            inverse = 1 / clip if isinstance(clip, Tensor) or clip else math.inf
            scales[home] = torch.as_tensor(inverse, dtype=torch.float32).to(home, non_blocking=True)
        _fused((weights, grads, *moments, steps_), one, found_inf, scales.get(home))
        if copy is not None:
            torch._foreach_copy_(rounded, weights)


def _step(step: float | Tensor, device: torch.device, cache: dict[Any, Tensor]) -> Tensor:
    """The step as the fused kernel takes it: a float32 scalar on the weights' device, one for each value."""
    if isinstance(step, Tensor):
        return step.to(device, torch.float32)
    if (step, device) not in cache:
        cache[step, device] = torch.tensor(float(step)).to(device, non_blocking=True)
    return cache[step, device]


def _fused(
    lists: Sequence[list[Tensor]], one: Update, found_inf: Tensor | None, grad_scale: Tensor | None = None
) -> None:
    weights, grads, m, v, steps = lists
    if found_inf is not None:
        found_inf = found_inf.to(weights[0].device)
    torch._fused_adamw_(
        weights, grads, m, v, [], steps, lr=one.lr, beta1=one.b1, beta2=one.b2, weight_decay=one.weight_decay,
        eps=one.eps, amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW by `adamw`, with a dtype for the moments, a compute copy, and clipping in the same pass.

    State names, step counts and parameter groups are those of torch.optim.AdamW, so a `state_dict` of either loads
    into the other. With copies it has the weights themselves too, under "masters": the model has only the copies.
    The step count is on the host, as it is there by default. One that a checkpoint loads onto a device stays there,
    and `found_inf` moves it there, as fused=True does in torch.optim.

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
        self._versions = self._copy_versions()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: Tensor | float = 1.0,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Take a step with `clip` times the gradients.

        Args:
            found_inf: a float32 scalar on the weights' device. Where it is 1 weights, moments and step counts stay as
                they are and the copies are written from the weights. The host does not wait for it.

        Raises:
            ValueError: for amsgrad or maximize in a group from a checkpoint, for copies of only some of the weights
                that have a gradient, and for random rounding with step counts on a device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, groups = [], []
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("param_groups: this AdamW knows neither amsgrad nor maximize; use torch.optim.AdamW")
            having = [p for p in group["params"] if p.grad is not None]
            params += having
            groups += [group] * len(having)
        if not params:
            return loss
        states = [self._state_of(p) for p in params]
        settings = [
            Update(
                group["lr"], float(group["betas"][0]), float(group["betas"][1]), group["eps"], group["weight_decay"], t
            )
            for group, t in zip(groups, self._counted(params, states, found_inf), strict=True)
        ]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        options = {"copy": self._copies(params), "rounding": self._rounding(settings), "found_inf": found_inf}
        type(self).update(params, [p.grad for p in params], *moments, settings, clip=clip, **options)
        self._versions = self._copy_versions()
        return loss

    def stale_copies(self) -> int:
        """How many copies others have written to, such that they no longer are their weights, rounded.

        The values are looked at only where PyTorch has counted a write since the last step or call.
        """
        versions = self._copy_versions()
        if versions == self._versions:
            return 0
        changed = [p for p, version in versions.items() if self._versions.get(p) != version]
        stale = {p for p in changed if not _is_rounded(self.copies[p], p)}
        self._versions = {p: version for p, version in versions.items() if p not in stale}
        return len(stale)

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _copy_versions(self) -> dict[Tensor, int]:
        return {p: copy._version for p, copy in self.copies.items()}

    def _counted(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], found_inf: Tensor | None
    ) -> list[Tensor | float]:
        """The number of this step for each tensor, which is also noted in its state."""
        if found_inf is not None:
            for p, state in zip(params, states, strict=True):
                if state["step"].device != p.device:
                    state["step"] = state["step"].to(p.device, torch.float32, non_blocking=True)
        counts = [state["step"] for state in states]
        taken: Tensor | int = 1 if found_inf is None else 1 - found_inf
        by_device: dict[torch.device, list[Tensor]] = {}
        for count in counts:
            by_device.setdefault(count.device, []).append(count)
        for device, some in by_device.items():
            torch._foreach_add_(some, [taken.to(device)] * len(some) if isinstance(taken, Tensor) else taken)
        on_host = iter(torch.stack(by_device[HOST]).tolist() if HOST in by_device else [])
        return [count if count.device != HOST else next(on_host) for count in counts]

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

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, which PyTorch gives its own attributes alone."""
        own = {"state_dtype": self.state_dtype, "copies": self.copies, "rounding": self.rounding}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = {}

    def state_dict(self) -> dict[str, Any]:
        """That of torch.optim.AdamW; with copies also the weights, as a list, under "masters"."""
        state = super().state_dict()
        if self.copies:
            state["masters"] = [p.detach() for p in self._weights()]
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but moments keep `state_dtype` where one is given.

        PyTorch casts loaded moments to the weights' dtype, so float32 moments of bfloat16 weights would lose bits.
        With copies the weights are loaded too, if the state has them; the copies are the model's to load.
        """
        super().load_state_dict(state_dict)
        if self.copies and "masters" in state_dict:
            for p, master in zip(self._weights(), state_dict["masters"], strict=True):
                p.copy_(master)
        if self.state_dtype is None:
            return
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, self._weights(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state_dict["state"].get(i, {}):
                    value = state_dict["state"][i][name]
                    self.state[p][name] = value.to(p.device, self.state_dtype, copy=True)


def _is_rounded(copy: Tensor, weight: Tensor) -> bool:
    """Whether one is the other rounded, to either neighbour."""
    least = torch.finfo(copy.dtype)
    close = torch.isclose(copy.to(weight.dtype), weight, rtol=least.eps, atol=least.tiny * least.eps, equal_nan=True)
    return bool(close.all())
