"""The time of each kernel against its bytes over the measured bandwidth, and against other implementations."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from device_checks import weights
from device_checks.clock import milliseconds
from device_checks.environment import bandwidth
from device_checks.logits import LOSSES, logits
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.memory import chunk_rows
from fsam_kernels.options import CROSS_ENTROPY
from fsam_kernels.shapes import Head
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.triton import softmax_stats as stages

BF16 = torch.bfloat16


def run(report: Report, sizes: Sizes) -> None:
    rate = bandwidth(sizes)
    timed = partial(_timed, sizes=sizes, rate=rate)
    for operation, (call, moved) in parameter_operations(sizes).items():
        report.case(operation, lambda: timed(call, moved))
    for name, head in sizes.heads.items():
        C = chunk_rows(head.V, 2, 4, CROSS_ENTROPY, None, "cuda", in_place=True, N=head.N)
        for stage, (call, moved) in of_logits(C, head, sizes.device).items():
            report.case(f"{stage}, {name}, {C} rows", lambda: timed(call, moved))
    # Last: compiling takes longest.
    name, head = next(iter(sizes.heads.items()))
    C = chunk_rows(head.V, 2, 4, CROSS_ENTROPY, None, "cuda", in_place=True, N=head.N)
    for peer, call in peers(C, head, sizes.device).items():
        report.case(f"{peer}, {name}, {C} rows", lambda: timed(call, 3 * 2 * C * head.V))


def _timed(call: Callable[[], Any], moved: int, *, sizes: Sizes, rate: float) -> dict[str, Any]:
    """`moved`: the least bytes, whose time at the measured bandwidth is the floor."""
    ms = milliseconds(call, sizes.device, sizes.repeats)
    return {"ms": ms, "least_bytes": moved, "x_floor": ms / (1e3 * moved / rate)}


def of_logits(C: int, head: Head, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Stage -> (call, least bytes), of both backends and of two sets of options."""
    u_CxV, labels_C = logits(C, head.V, BF16, device)
    p_CxV, moved = torch.zeros_like(u_CxV), 2 * C * head.V
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, loss in LOSSES.items():
        rows, _ = stages.statistics(u_CxV, labels_C, loss)
        found[f"statistics, {name}"] = partial(stages.statistics, u_CxV, labels_C, loss), moved
        found[f"cotangent, {name}"] = partial(stages.cotangent, u_CxV, rows, labels_C, loss, p_CxV), 2 * moved
    found["through_cap"] = partial(stages.through_cap_, p_CxV, u_CxV, 30.0), 3 * moved
    found["plain statistics and cotangent"] = partial(_plain, u_CxV, labels_C, p_CxV), 3 * moved
    return found


def _plain(u_CxV: Tensor, labels_C: Tensor, p_CxV: Tensor) -> None:
    rows, e_CxV = plain.statistics(u_CxV, labels_C, CROSS_ENTROPY)
    plain.cotangent(e_CxV, rows, labels_C, CROSS_ENTROPY, p_CxV)


def peers(C: int, head: Head, device: str) -> dict[str, Callable[[], Any]]:
    """Cross entropy of given logits, forward and backward: what statistics and cotangent do together."""
    u_CxV, labels_C = logits(C, head.V, BF16, device)
    labels_C = labels_C.clamp_min(0)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        def call() -> None:
            x_CxV = u_CxV.detach().requires_grad_()
            loss(x_CxV, labels_C).backward()

        return call

    found = {"torch cross_entropy": gradient(F.cross_entropy)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger cross_entropy"] = gradient(liger_cross_entropy)
    backend = "inductor" if device == "cuda" else "eager"
    found["torch.compile cross_entropy"] = gradient(torch.compile(F.cross_entropy, backend=backend))
    return found


def parameter_operations(sizes: Sizes) -> dict[str, tuple[Callable[[], Any], int]]:
    """Operation -> (call, least bytes), over all tensors of a model, and PyTorch's own."""
    t = weights.make(sizes.weights, sizes.device)
    elements, count = sum(math.prod(shape) for shape in sizes.weights), len(sizes.weights)
    adam, updates = [weights.ADAM] * count, [weights.UPDATE] * count
    scale = torch.tensor(weights.SCALE, device=sizes.device)
    out = {dtype: [torch.empty_like(x, dtype=dtype) for x in t.theta] for dtype in (torch.float32, BF16)}
    params = [torch.nn.Parameter(x.clone()) for x in t.theta]
    for p, g in zip(params, t.g, strict=True):
        p.grad = g
    fused = torch.optim.AdamW(params, lr=1e-2, fused=True)
    moved = lambda dtype: weights.perturb(t.theta, t.g, t.v, scale, adam=adam, out=out[dtype])
    update = lambda **options: weights.adamw(t.theta, t.g, t.m, t.v, updates, **options)
    step = torch.tensor(float(weights.UPDATE.step), device=sizes.device)
    counted = [weights.UPDATE._replace(step=step)] * count
    skip = torch.zeros((), device=sizes.device)
    decided = lambda **options: weights.adamw(t.theta, t.g, t.m, t.v, counted, found_inf=skip, **options)
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "preconditioned_norm": (lambda: weights.preconditioned_norm(t.g, t.v, adam=adam), 8),
        "torch foreach norm": (lambda: torch._foreach_norm(t.g), 4),
        "perturb": (lambda: moved(torch.float32), 16),
        "perturb to bfloat16": (lambda: moved(BF16), 14),
        "adamw": (update, 28),
        "adamw, bfloat16 copy": (lambda: update(copy=out[BF16]), 30),
        "adamw, bfloat16 copy, counts on the device": (lambda: decided(copy=out[BF16]), 30),
        "lerp": (lambda: weights.lerp_(t.m, t.g, scale), 12),
        "torch AdamW, fused": (fused.step, 28),
    }
    return {name: (call, least * elements) for name, (call, least) in calls.items()}
