"""Correctness of the Triton parameter operations, against float64 on the device."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from device_checks.errors import worst
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.torch import Adam, Rounding, Update
from fsam_kernels.triton import AdamW, adamw, lerp_, perturb, preconditioned_norm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAM = Adam(0.95, 1e-8, 1 - 0.95**10)
UPDATE = Update(1e-2, 0.9, 0.95, 1e-8, 0.1, 10)
CLIP, SCALE = 0.7, 0.05
RANDOM = Rounding(stochastic=True, seed=3, step=1)
SHARES = (0.0, 0.125, 0.9, 1.0)
COUNTS = (1, 2, 10, 1000, 12345, 2**20)  # of steps; bias corrections from the first to one that is 1 in float32
LENGTHS = (1, 5, 2047, 2048, 2049, 0, 3 * 2048)
SUM_ERROR = 1e-5  # relative, of a float32 sum
TERM_ERROR = 1e-7  # absolute, of a float32 sum of terms up to 0.3, which may cancel
NAMES = ("theta", "exp_avg", "exp_avg_sq")


class Tensors(NamedTuple):
    theta: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]


def run(report: Report, sizes: Sizes) -> None:
    shapes = [(n,) for n in LENGTHS] + sizes.weights
    for dtype in (F32, BF16, F16):
        name = str(dtype).removeprefix("torch.")
        report.check(f"preconditioned_norm, {name} g", lambda: of_norm(make(shapes, sizes.device, g=dtype)))
    for dtype, rounding in ((F32, None), (BF16, None), (BF16, RANDOM)):
        name = f"perturb to {str(dtype).removeprefix('torch.')}{' at random' if rounding else ''}"
        options = {"dtype": dtype, **({"rounding": rounding} if rounding else {})}
        report.check(name, lambda: of_perturb(make(shapes, sizes.device), options))
    report.check("adamw", lambda: of_adamw(make(shapes, sizes.device)))
    report.check("adamw, bfloat16 copy", lambda: of_adamw(make(shapes, sizes.device), copies=True))
    low = lambda: of_adamw(make(shapes, sizes.device, moments=BF16), copies=True, rounding=RANDOM)
    report.check("adamw, bfloat16 moments and copy at random", low)
    counted = lambda: of_adamw(make(shapes, sizes.device), copies=True, counted=True)
    report.check("adamw, rates and step counts on the device", counted)
    report.check("adamw, a step skipped on the device", lambda: of_skip(make(shapes, sizes.device)))
    report.check("AdamW, the second of three steps skipped", lambda: of_optimizer(make(shapes, sizes.device)))
    for dtype in (F32, BF16):
        name = str(dtype).removeprefix("torch.")
        report.check(f"lerp to {name}", lambda: of_lerp(make(shapes, sizes.device, g=dtype)))
    report.check("adamw of an offset view", lambda: of_adamw(offset(make([(5001,)], sizes.device))))
    report.check("adamw of more than 2^31 weights", lambda: of_adamw(huge(sizes), ends=4096))


def make(
    shapes: list[tuple[int, ...]], device: str, *, g: torch.dtype = F32, moments: torch.dtype = F32, seed: int = 0
) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda std: [torch.randn(s, device=device, generator=generator).mul_(std) for s in shapes]
    gradients = [x.to(g) for x in draw(1e-2)]
    v = [x.square_().add_(1e-6).to(moments) for x in draw(1e-2)]
    return Tensors(draw(0.02), gradients, [x.to(moments) for x in draw(1e-2)], v)


def offset(tensors: Tensors) -> Tensors:
    """The same in views that start at no multiple of 16 bytes."""
    views = []
    for each in tensors:
        views.append([torch.empty(x.numel() + 3, dtype=x.dtype, device=x.device)[3:].copy_(x) for x in each])
    return Tensors(*views)


def huge(sizes: Sizes) -> Tensors:
    """One weight whose last elements are beyond 32 bits; its tensors repeat a pattern, which is quicker to draw."""
    small = make([(4099,)], sizes.device)
    repeats = -(-sizes.huge_weights // 4099)
    return Tensors(*([x[0].repeat(repeats)[: sizes.huge_weights]] for x in small))


def direction(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(c g, d) in float64."""
    cg = CLIP * g.double()
    moment = ADAM.b2 * v.double() + (1 - ADAM.b2) * cg**2
    return cg, cg / ((moment / ADAM.correction).sqrt() + ADAM.eps)


def of_norm(t: Tensors) -> dict[str, float]:
    adam = [ADAM] * len(t.g)
    got = preconditioned_norm(t.g, t.v, clip=CLIP, adam=adam, gradient=True)
    parts = [direction(*each) for each in zip(t.g, t.v, strict=True)]
    want = [sum(x.sum() for x in each) for each in zip(*((d * d, cg * d, cg * cg) for cg, d in parts), strict=True)]
    names = ("sum of d^2", "sum of g d", "sum of g^2")
    return {name: abs(float(x) / float(y) - 1) / SUM_ERROR for name, x, y in zip(names, got, want, strict=True)}


def of_perturb(t: Tensors, options: dict[str, Any]) -> dict[str, float]:
    scale = torch.tensor(SCALE, device=t.theta[0].device)
    moved = perturb(t.theta, t.g, t.v, scale, clip=CLIP, adam=[ADAM] * len(t.g), **options)
    # Rounding at random goes to either neighbour: a whole unit, not half.
    units = 2 if "rounding" in options else 1
    found = [
        worst(x, theta.double() + SCALE * direction(g, v)[1], TERM_ERROR) / units
        for x, theta, g, v in zip(moved, t.theta, t.g, t.v, strict=True)
    ]
    return {"moved": max(found)}


def of_adamw(
    t: Tensors, *, copies: bool = False, counted: bool = False, ends: int | None = None, **options: Any
) -> dict[str, float]:
    """
    Args:
        counted: whether rates, step counts and the decision to update are on the device.
        ends: how many elements are compared at either end; None for all.
    """
    parts = lambda x: x.reshape(-1) if ends is None else torch.cat([x[:ends], x[-ends:]])
    updates, device = [UPDATE] * len(t.theta), t.theta[0].device
    if counted:
        updates = [UPDATE._replace(step=COUNTS[i % len(COUNTS)]) for i in range(len(t.theta))]
    rows = zip(*t, updates, strict=True)
    wants = [_adamw(*(parts(x).double() for x in arrays), update) for *arrays, update in rows]
    if counted:
        rate = torch.tensor(UPDATE.lr, device=device)
        steps = [torch.tensor(float(one.step), device=device) for one in updates]
        updates = [UPDATE._replace(lr=rate, step=step) for step in steps]
        options["found_inf"] = torch.zeros((), device=device)
    copy = [torch.full_like(x, torch.nan, dtype=BF16) for x in t.theta] if copies else None
    adamw(t.theta, t.g, t.m, t.v, updates, clip=CLIP, copy=copy, **options)
    units = 2 if "rounding" in options else 1
    found = _errors(Tensors(*([parts(x) for x in each] for each in t)), wants, TERM_ERROR, units)
    if copy is not None:
        found["copy"] = max(worst(parts(x), want[0], TERM_ERROR) / units for x, want in zip(copy, wants, strict=True))
    return found


def of_skip(t: Tensors) -> dict[str, float]:
    """No bit of weights and moments changes; the copy is rounded from the weights."""
    t.g[0].fill_(torch.nan)
    before = [[x.clone() for x in each] for each in (t.theta, t.m, t.v)]
    copy = [torch.full_like(x, torch.nan, dtype=BF16) for x in t.theta]
    skip = torch.ones((), device=t.theta[0].device)
    adamw(t.theta, t.g, t.m, t.v, [UPDATE] * len(t.theta), clip=CLIP, copy=copy, found_inf=skip)
    same = lambda xs, ys: all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    kept = dict(zip(NAMES, map(same, (t.theta, t.m, t.v), before), strict=True))
    copied = max(worst(x, theta.double()) for x, theta in zip(copy, t.theta, strict=True))
    return {name: 0.0 if ok else math.inf for name, ok in kept.items()} | {"copy": copied}


def of_optimizer(t: Tensors) -> dict[str, float]:
    """Rate, clipping, decision and step counts are on the device, where the counts end at that of two updates."""
    device, first = t.theta[0].device, UPDATE.step
    wants = [_adamw(*(x.double() for x in arrays), UPDATE) for arrays in zip(*t, strict=True)]
    again = [(theta, g.double(), m, v) for (theta, m, v), g in zip(wants, t.g, strict=True)]
    wants = [_adamw(*arrays, UPDATE._replace(step=first + 1)) for arrays in again]
    params = [torch.nn.Parameter(x) for x in t.theta]
    scalar = lambda x: torch.tensor(x, device=device)
    _, b1, b2, eps, decay, _ = UPDATE
    optimizer = AdamW(params, scalar(UPDATE.lr), (b1, b2), eps, decay)
    for p, m, v in zip(params, t.m, t.v, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(first - 1)), "exp_avg": m, "exp_avg_sq": v}
    for skip in (0.0, 1.0, 0.0):
        for p, g in zip(params, t.g, strict=True):
            p.grad = torch.full_like(g, torch.nan) if skip else g
        optimizer.step(clip=scalar(CLIP), found_inf=scalar(skip))
    counts = [float(state["step"]) for state in optimizer.state.values()]
    return _errors(t, wants, 2 * TERM_ERROR) | {"count": 0.0 if set(counts) == {first + 1} else math.inf}


def of_lerp(t: Tensors) -> dict[str, float]:
    """From float32 arrays to those of `t.g`, by each share; 0 and 1 give the two arrays themselves."""
    found = {}
    for share in SHARES:
        x = [each.clone() for each in t.m]
        wants = [a.double() + share * (b.double() - a.double()) for a, b in zip(x, t.g, strict=True)]
        lerp_(x, t.g, torch.tensor(share, device=t.m[0].device))
        floor = TERM_ERROR if 0 < share < 1 else 0.0
        found[f"share {share}"] = max(worst(got, want, floor) for got, want in zip(x, wants, strict=True))
    return found


def _errors(t: Tensors, wants: list[tuple[Tensor, ...]], floor: float, units: int = 1) -> dict[str, float]:
    # Second moments are sums of squares, which do not cancel.
    outputs = zip(NAMES, (t.theta, t.m, t.v), (floor, floor, 0.0), strict=True)
    return {
        name: max(worst(x, want[i], least) / units for x, want in zip(got, wants, strict=True))
        for i, (name, got, least) in enumerate(outputs)
    }


def _adamw(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, update: Update) -> tuple[Tensor, Tensor, Tensor]:
    lr, b1, b2, eps, decay, step = update
    cg = CLIP * g
    m, v = b1 * m + (1 - b1) * cg, b2 * v + (1 - b2) * cg**2
    moved = lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
    return (1 - lr * decay) * theta - moved, m, v
