"""What a step does in parameter space, by fsam's operations and as SAM wrappers do it: `fsam profile parameters`.

A step of preconditioned Functional-SAM with clipping, without its two passes through the model:

    c = min(1, clip / ‖g‖),   d = c g / (sqrt(v̂) + δ),   θ' = θ + ρ d / ‖d‖,   ĉ = min(1, clip / ‖ĝ‖),   AdamW with ĉ ĝ

The gradients g and ĝ are given. Rivals, each around PyTorch's own AdamW and `clip_grad_norm_`:

* textbook: a loop over the tensors that clones a weight, adds to it in place and puts the clone back, with
  AdamW(foreach=False, fused=False);
* foreach: the same by torch._foreach_* operations on all tensors at a time, with AdamW(fused=True).

Putting the clone back is an assignment of `p.data` in both, which copies nothing. All variants take turns in one
process, so that a machine that slows down slows them all; ratios are between neighbouring turns.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console as Rich
from rich.table import Table
from torch import Tensor

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling import results
from fsam_trainers import timing
from fsam_trainers.console import Console

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
# In the place of norm and perturbation where the direction is stored between the two, as on a CPU.
KEPT = {"direction, stored, and its norm": 12, "perturb along it": 12}


@dataclass(frozen=True)
class Options:
    """Time what a step does in parameter space, by fsam and as a textbook SAM wrapper does it."""

    model: str = "24m"
    """whose tensors: 24m, 118m, 1208m or gpt2"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is a GPU, else cpu"""
    threads: int | None = None
    """of PyTorch, on a CPU; its own choice without it"""
    repeats: int = 15
    """turns of each variant"""
    json: Path | None = None
    """also write the figures here"""


class Variant(abc.ABC):
    """One way to do it, with weights, gradients and moments of its own; `g` and `second` are read by all."""

    def __init__(self, shapes: Sequence[Sequence[int]], g: list[Tensor], second: list[Tensor], device: str) -> None:
        make = torch.Generator().manual_seed(1)
        self.g, self.second = g, second
        self.params = [torch.nn.Parameter((0.02 * torch.randn(tuple(s), generator=make)).to(device)) for s in shapes]

    def begin(self, optimizer: Any) -> None:
        """A first update, after which there is a second moment."""
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
        """All of it, once."""


class Ours(Variant):
    """By a backend's operations; first d, then θ+ε in a second array, 4 bytes a weight, which is kept."""

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


class Textbook(Variant):
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


class Foreach(Variant):
    """All tensors at a time."""

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


def variants(shapes: Sequence[Sequence[int]], device: str) -> dict[str, Variant]:
    """Every way to do it on this device; clipping, which works in place in the rivals, finds its own ĝ in each."""
    make = torch.Generator().manual_seed(0)
    g, second = ([(1e-3 * torch.randn(tuple(s), generator=make)).to(device) for s in shapes] for _ in range(2))
    own = lambda: (shapes, g, [x.clone() for x in second], device)
    found: dict[str, Variant] = {"textbook": Textbook(*own()), "foreach": Foreach(*own())}
    for backend in ("torch", "triton") if device == "cuda" else ("torch",):
        found[f"fsam {backend}"] = Ours(backend, shapes, g, second, device)
    return found


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: str, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """`timing.interleaved` of calls without arguments on that device."""
    ignoring = lambda call: lambda _: call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return timing.interleaved({name: ignoring(call) for name, call in calls.items()}, repeats, tick, wait=wait)


def measure(shapes: Sequence[Sequence[int]], device: str, repeats: int, tick: Callable[[], None] = lambda: None) -> Any:
    """(rows of the variants, rows of fsam's operations).

    Of a variant: variant, ms, and for each rival `to_<rival>` with `_p20` and `_p80`. Of an operation: backend,
    operation, ms, least_bytes (all weights), gigabytes_per_second (of those), and its ratio to a copy of the weights,
    `to_copy` with `_p20` and `_p80`.
    """
    ways = variants(shapes, device)
    times = interleaved(ways, repeats, device, tick)
    rows = []
    for name, mine in times.items():
        row: dict[str, Any] = {"variant": name, "ms": timing.against(mine, mine).step_ms}
        for rival in RIVALS:
            row |= _ratio(f"to_{rival}", mine, times[rival])
        rows.append(row)
    elements = sum(math.prod(shape) for shape in shapes)
    operations = []
    for name, way in ways.items():
        if isinstance(way, Ours):
            parts = interleaved(way.pieces(), repeats, device, tick)
            for operation in parts:
                least = (OPERATIONS | KEPT)[operation]
                ms = timing.against(parts[operation], parts[operation]).step_ms
                row = {"backend": name, "operation": operation, "ms": ms, "least_bytes": least * elements}
                row["gigabytes_per_second"] = least * elements / ms / 1e6
                operations.append(row | _ratio("to_copy", parts[operation], parts["copy of the weights"]))
    return rows, operations


def _ratio(name: str, mine: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    _, middle, low, high = timing.against(mine, base)
    return {name: middle, f"{name}_p20": low, f"{name}_p80": high}


def run(options: Options) -> int:
    """Measure, print two tables, write the file; 0.

    Raises:
        UserError: for a model that is not known, a GPU that is not there, and numbers that make no sense.
    """
    if options.model not in WEIGHTS:
        raise UserError(f"--model: {options.model!r} is not known; use {', '.join(WEIGHTS)}")
    if options.repeats < 1:
        raise UserError(f"--repeats: at least 1 is needed, got {options.repeats}")
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads: at least 1 is needed, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: PyTorch finds no GPU here; use cpu")
    device = "cuda" if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()) else "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shapes = WEIGHTS[options.model]
    ours = 2 if device == "cuda" else 1
    parts = ours * len(OPERATIONS) + (len(KEPT) if device == "cpu" else 0)
    turns = (2 + options.repeats) * (len(RIVALS) + ours + parts)
    with Console().counting("timing", turns) as tick:
        rows, operations = measure(shapes, device, options.repeats, tick)
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    elements = sum(math.prod(shape) for shape in shapes)
    about = {"model": options.model, "device": where, "tensors": len(shapes), "parameters": elements}
    about["repeats"] = options.repeats
    if options.json is not None:
        results.write(options.json, "parameters", [*rows, *operations], about)
    rich = Rich(width=110)
    for table in tables(rows, operations, f"{options.model}, {elements / 1e6:,.1f} M weights, {where}"):
        rich.print(table)
    return 0


def tables(rows: list[dict[str, Any]], operations: list[dict[str, Any]], title: str) -> list[Table]:
    """The variants, and fsam's operations; medians with the 20th and the 80th percentile."""
    spread = lambda row, name: f"{row[name]:.2f} ({row[f'{name}_p20']:.2f}–{row[f'{name}_p80']:.2f})"
    steps = Table("variant", "ms", *(f"x {rival}" for rival in RIVALS), title=f"Parameter space of a step: {title}")
    for row in rows:
        steps.add_row(row["variant"], f"{row['ms']:,.1f}", *(spread(row, f"to_{rival}") for rival in RIVALS))
    parts = Table("backend", "operation", "ms", "least GB/s", "x copy of the weights", title="Its operations")
    for row in operations:
        figures = (f"{row['ms']:,.1f}", f"{row['gigabytes_per_second']:,.1f}", spread(row, "to_copy"))
        parts.add_row(row["backend"], row["operation"], *figures)
    return [steps, parts]
