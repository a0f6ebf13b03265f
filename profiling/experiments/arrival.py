"""How much of a perturbation reaches the weights that the second pass reads.

    python profiling/experiments/arrival.py

Weights are drawn from N(0, 0.02²), scales of layer norms from N(1, 0.02²). Each row of a gradient has a scale of its
own, over five orders of magnitude in the embedding; second moments are those of gradients of the same rows. ε is
computed in float64 by `fsam_kernels.spec`, the written weights by `fsam_kernels.torch.perturb`. With
Δ = compute(θ + ε) − compute(θ), where compute rounds to the compute dtype:

    projection   Δᵀ ε / ‖ε‖²: the part of ε that arrives, 1 where nothing is lost
    length       ‖Δ‖ / ‖ε‖: more than 1 where rounding adds noise

Adding the perturbation to bfloat16 weights in place is wrong, and shown for comparison.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fsam_core.errors import UserError
from fsam_kernels import spec
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.torch import Adam, Rounding, perturb, preconditioned_norm
from fsam_profiling import results

ADAM: dict[str, Any] = {"b2": 0.95, "eps": 1e-8, "correction": 1 - 0.95**100}
WAYS = ("float32", "bfloat16 from masters", "bfloat16 from masters, at random", "bfloat16 in place")


@dataclass(frozen=True)
class ArrivalOptions:
    """Measure how much of a preconditioned perturbation arrives in float32 and in bfloat16 weights."""

    model: str = "24m"
    """whose tensors: 24m, 118m, 1208m or gpt2"""
    rho: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """lengths of the perturbation"""
    json: Path | None = None
    """also write the figures here"""


def tensors(shapes: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(θ, g, v) of each weight, deterministic."""
    for i, shape in enumerate(shapes):
        make = torch.Generator().manual_seed(i)
        draw = lambda *size: torch.randn(size, generator=make)
        spread = 2.0 if i == 0 else 0.5  # of the logarithm of a row's scale; the embedding comes first
        rows = 1e-4 * torch.exp(spread * draw(shape[0], *(1 for _ in shape[1:])))
        theta = draw(*shape) * 0.02 + (1.0 if len(shape) == 1 else 0.0)
        seen = torch.stack([draw(*shape).square() for _ in range(4)]).mean(0) * rows.square()
        yield theta, rows * draw(*shape), seen


def measure(shapes: Sequence[Sequence[int]], rhos: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each ρ and way: rho, way, projection, length, over all weights of these shapes together."""
    adam = [Adam(**ADAM)]
    square = sum(float(preconditioned_norm([g], [v], adam=adam).d_sumsq) for _, g, v in tensors(shapes))
    sums = {(rho, way): np.zeros(3) for rho in rhos for way in WAYS}
    for place, (theta, g, v) in enumerate(tensors(shapes)):
        d = torch.from_numpy(spec.direction(g.numpy(), v.numpy(), **ADAM))
        for rho, way in sums:
            scale = rho / math.sqrt(square)
            epsilon = (scale * d).ravel()
            before, after = _written(way, theta, g, v, epsilon, torch.tensor(scale), adam, place)
            delta = after.double().ravel() - before.double().ravel()
            sums[rho, way] += [float(x @ y) for x, y in ((delta, epsilon), (delta, delta), (epsilon, epsilon))]
    return [
        {"rho": rho, "way": way, "projection": float(along / whole), "length": math.sqrt(length / whole)}
        for (rho, way), (along, length, whole) in sums.items()
    ]


def _written(
    way: str, theta: Tensor, g: Tensor, v: Tensor, epsilon: Tensor, scale: Tensor, adam: list[Adam], place: int
) -> tuple[Tensor, Tensor]:
    """(compute(θ), compute(θ + ε))."""
    if way == "float32":
        return theta, perturb([theta], [g], [v], scale, adam=adam)[0]
    half = theta.to(torch.bfloat16)
    if way == "bfloat16 in place":
        return half, half + epsilon.to(torch.bfloat16).view(theta.shape)
    rounding = Rounding(way.endswith("random"), seed=place, step=1)
    return half, perturb([theta], [g], [v], scale, adam=adam, dtype=torch.bfloat16, rounding=rounding)[0]


def main() -> None:
    options = tyro.cli(ArrivalOptions, prog="python profiling/experiments/arrival.py")
    try:
        if options.model not in WEIGHTS:
            raise UserError(f"--model: {options.model!r} is not known; use {', '.join(WEIGHTS)}")
        rows = measure(WEIGHTS[options.model], options.rho)
        if options.json is not None:
            results.write(options.json, "arrival", rows, {"model": options.model}, "arrival")
    except UserError as error:
        sys.exit(f"arrival: error: {error}")
    table = Table("weights", *(f"ρ = {rho:g}" for rho in options.rho), title=f"{options.model}: projection (length)")
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        table.add_row(way, *(f"{row['projection']:.4f} ({row['length']:.3f})" for row in mine))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
