"""A step's work in parameter space, three ways: by fsam's operations, by a loop over the tensors, and by foreach.

    c = min(1, clip / ‖g‖),   d = c g / (sqrt(v̂) + δ),   θ' = θ + ρ d / ‖d‖,   ĉ = min(1, clip / ‖ĝ‖),   AdamW with ĉ ĝ

The gradients g and ĝ are given. The rivals wrap PyTorch's own AdamW and `clip_grad_norm_`:

* textbook: a loop over the tensors that clones a weight, adds to it in place and puts the clone back, with
  AdamW(foreach=False, fused=False);
* foreach: the same by torch._foreach_* operations on all tensors together, with AdamW(fused=True).

In both, the clone is put back by assigning `p.data`, which copies nothing.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fsam_core import backends
from fsam_trainers import timing

RHO, CLIP, B2, EPS, LR = 0.5, 1.0, 0.95, 1e-8, 1e-4
ADAM: dict[str, Any] = {"lr": LR, "betas": (0.9, B2), "eps": EPS, "weight_decay": 1e-4}
RIVALS = ("textbook", "foreach")
# Least bytes of each operation for a float32 weight: what it reads and writes, each once.
OPERATIONS = {
    "copy of the weights": 8,
    "norm of g": 4,
    "preconditioned norm": 8,
    "perturb": 16,
    "norm of ĝ": 4,
    "adamw": 28,
}
# These replace norm and perturbation where the direction is stored between the two, as on a CPU.
KEPT = {"direction, stored, and its norm": 12, "perturb along it": 12}


class ParameterStep(abc.ABC):
    """One implementation, with weights and moments of its own; all read the same `g` and `second`."""

    def __init__(self, shapes: Sequence[Sequence[int]], g: list[Tensor], second: list[Tensor], device: str) -> None:
        make = torch.Generator().manual_seed(1)
        self.g, self.second = g, second
        self.params = [torch.nn.Parameter((0.02 * torch.randn(tuple(s), generator=make)).to(device)) for s in shapes]

    def begin(self, optimizer: Any) -> None:
        """Take a first update, which makes the second moments."""
        self.optimizer = optimizer
        self.second_pass()
        optimizer.step()

    def second_pass(self) -> None:
        for p, g in zip(self.params, self.second, strict=True):
            p.grad = g

    def moments(self) -> tuple[list[Tensor], float]:
        """(AdamW's second moments, 1 − β₂ᵗ of the step to come)."""
        states = [self.optimizer.state[p] for p in self.params]
        return [x["exp_avg_sq"] for x in states], 1 - B2 ** (float(states[0]["step"]) + 1)

    @abc.abstractmethod
    def __call__(self) -> None:
        """The work of one step."""


class FsamStep(ParameterStep):
    """By a backend's operations. A second array, 4 bytes a weight, is kept; it holds d, then θ+ε."""

    def __init__(self, backend: str, *given: Any) -> None:
        super().__init__(*given)
        self.ops = backends.load("torch", backend)
        self.begin(self.ops.AdamW(self.params, **ADAM))
        self.moved = [torch.empty_like(p) for p in self.params]
        self.keeps = hasattr(self.ops, "direction_and_norm") and self.moved[0].device.type == "cpu"

    def clip(self, g: list[Tensor]) -> Tensor:
        return (CLIP / self.ops.preconditioned_norm(g).d_sumsq.sqrt()).clamp(max=1.0)

    def adam(self) -> list[Any]:
        v, correction = self.moments()
        return [self.ops.Adam(B2, EPS, correction)] * len(v)

    def direction(self, clip: Tensor) -> Tensor:
        v, out = self.moments()[0], self.moved
        return RHO / self.ops.direction_and_norm(self.g, v, clip=clip, adam=self.adam(), out=out).sqrt()

    def along(self, scale: Tensor) -> None:
        self.ops.perturb(self.params, self.moved, None, scale, out=self.moved)

    def scale(self, clip: Tensor) -> Tensor:
        v = self.moments()[0]
        return RHO / self.ops.preconditioned_norm(self.g, v, clip=clip, adam=self.adam()).d_sumsq.sqrt()

    def perturb(self, clip: Tensor, scale: Tensor) -> None:
        v, out = self.moments()[0], self.moved
        self.ops.perturb(self.params, self.g, v, scale, clip=clip, adam=self.adam(), out=out)

    def __call__(self) -> None:
        clip = self.clip(self.g)
        if self.keeps:
            self.along(self.direction(clip))
        else:
            self.perturb(clip, self.scale(clip))
        self.second_pass()
        self.optimizer.step(clip=self.clip(self.second))

    def pieces(self) -> dict[str, Callable[[], Any]]:
        """Each of `OPERATIONS` by itself, and of `KEPT` where the step has those."""
        clip = self.clip(self.g)
        scale = self.scale(clip)
        kept: list[Callable[[], Any]] = [lambda: self.direction(clip), lambda: self.along(scale)]
        found: dict[str, Callable[[], Any]] = {
            "copy of the weights": lambda: [x.copy_(p.detach()) for x, p in zip(self.moved, self.params, strict=True)],
            "norm of g": lambda: self.clip(self.g),
            "preconditioned norm": lambda: self.scale(clip),
            "perturb": lambda: self.perturb(clip, scale),
            "norm of ĝ": lambda: self.clip(self.second),
            "adamw": lambda: self.optimizer.step(clip=clip),
        }
        return found | (dict(zip(KEPT, kept, strict=True)) if self.keeps else {})


class TextbookStep(ParameterStep):
    """A loop over the tensors."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.begin(torch.optim.AdamW(self.params, **ADAM, foreach=False, fused=False))

    @torch.no_grad()
    def __call__(self) -> None:
        moments, correction = self.moments()
        norm = torch.stack([g.norm() for g in self.g]).norm()
        clip = (CLIP / norm).clamp(max=1.0)
        directions = []
        for g, v in zip(self.g, moments, strict=True):
            cg = clip * g
            directions.append(cg / (((B2 * v + (1 - B2) * cg**2) / correction).sqrt() + EPS))
        scale = RHO / torch.stack([d.norm() for d in directions]).norm()
        kept = []
        for p, d in zip(self.params, directions, strict=True):
            kept.append(p.data.clone())
            p.add_(d * scale)
        del directions, d
        self.second_pass()
        for p, old in zip(self.params, kept, strict=True):
            p.data = old
        torch.nn.utils.clip_grad_norm_(self.params, CLIP, foreach=False)
        self.optimizer.step()


class ForeachStep(ParameterStep):
    """All tensors together, by torch._foreach_* operations."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.begin(torch.optim.AdamW(self.params, **ADAM, fused=True))

    @torch.no_grad()
    def __call__(self) -> None:
        moments, correction = self.moments()
        clip = (CLIP / torch.stack(torch._foreach_norm(self.g)).norm()).clamp(max=1.0)
        directions = torch._foreach_mul(self.g, clip)
        below = torch._foreach_mul(moments, B2 / correction)
        torch._foreach_addcmul_(below, directions, directions, (1 - B2) / correction)
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, EPS)
        torch._foreach_div_(directions, below)
        del below
        scale = RHO / torch.stack(torch._foreach_norm(directions)).norm()
        kept = [p.data.clone() for p in self.params]
        torch._foreach_mul_(directions, scale)
        torch._foreach_add_(list(self.params), list(directions))
        del directions
        self.second_pass()
        for p, old in zip(self.params, kept, strict=True):
            p.data = old
        torch.nn.utils.clip_grad_norm_(self.params, CLIP, foreach=True)
        self.optimizer.step()


def parameter_steps(shapes: Sequence[Sequence[int]], device: str) -> dict[str, ParameterStep]:
    """Every implementation for this device. The rivals clip in place, so each has a ĝ of its own."""
    make = torch.Generator().manual_seed(0)
    g, second = ([(1e-3 * torch.randn(tuple(s), generator=make)).to(device) for s in shapes] for _ in range(2))
    own = lambda: (shapes, g, [x.clone() for x in second], device)
    found: dict[str, ParameterStep] = {"textbook": TextbookStep(*own()), "foreach": ForeachStep(*own())}
    for backend in ("torch", "triton") if device == "cuda" else ("torch",):
        found[f"fsam {backend}"] = FsamStep(backend, shapes, g, second, device)
    return found


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: str, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """`timing.interleaved` of calls without arguments on that device."""
    ignoring = lambda call: lambda _: call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return timing.interleaved({name: ignoring(call) for name, call in calls.items()}, repeats, tick, wait=wait)


def measure(shapes: Sequence[Sequence[int]], device: str, repeats: int, tick: Callable[[], None] = lambda: None) -> Any:
    """(one row a step, one row an operation of fsam's).

    Of a step: variant, ms, and for each rival `to_<rival>` with `_p20` and `_p80`. Of an operation: backend,
    operation, ms, least_bytes (all weights), gigabytes_per_second (of those), and its ratio to a copy of the weights,
    `to_copy` with `_p20` and `_p80`.
    """
    steps = parameter_steps(shapes, device)
    times = interleaved(steps, repeats, device, tick)
    rows = []
    for name, mine in times.items():
        row: dict[str, Any] = {"variant": name, "ms": timing.relative_cost(mine, mine).step_ms}
        for rival in RIVALS:
            row |= _ratio(f"to_{rival}", mine, times[rival])
        rows.append(row)
    elements = sum(math.prod(shape) for shape in shapes)
    operations = []
    for name, step in steps.items():
        if isinstance(step, FsamStep):
            parts = interleaved(step.pieces(), repeats, device, tick)
            for operation in parts:
                least = (OPERATIONS | KEPT)[operation]
                ms = timing.relative_cost(parts[operation], parts[operation]).step_ms
                row = {"backend": name, "operation": operation, "ms": ms, "least_bytes": least * elements}
                row["gigabytes_per_second"] = least * elements / ms / 1e6
                operations.append(row | _ratio("to_copy", parts[operation], parts["copy of the weights"]))
    return rows, operations


def _ratio(name: str, mine: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    _, middle, low, high = timing.relative_cost(mine, base)
    return {name: middle, f"{name}_p20": low, f"{name}_p80": high}
