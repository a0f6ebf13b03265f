"""Pallas kernels of the norm and of AdamW that were tried and gained nothing.

    python profiling/experiments/parameter_trial.py

A leaf of two axes is one call over blocks of its rows; all smaller leaves are packed into one array and one call. The
kernels are compiled for a TPU and compared with XLA's loops for the plain operations (`fsam_profiling.tpu.parameters`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.xla.adamw import Updated
from fsam_kernels.xla.direction import Adam
from fsam_profiling.tpu import parameters

BLOCK_BYTES = 2**19  # of each array; a v5e holds 14 of them twice in a quarter of its VMEM
PACKED = 1024  # columns of the array of small leaves


def packed(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays of two axes that hold all elements: each leaf of two axes, and the others in one, zeros at its end."""
    large = [x for x in leaves if x.ndim == 2]
    small = [x.ravel() for x in leaves if x.ndim != 2]
    if not small:
        return large
    short = -sum(x.size for x in small) % (8 * PACKED)
    return [*large, jnp.concatenate([*small, jnp.zeros(short, small[0].dtype)]).reshape(-1, PACKED)]


def unpacked(arrays: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """The leaves, from the arrays of `packed`."""
    large, flat, at, found = iter(arrays), arrays[-1].ravel(), 0, []
    for x in like:
        if x.ndim == 2:
            found.append(next(large))
        else:
            found.append(flat[at : at + x.size].reshape(x.shape))
            at += x.size
    return found


def norm(g: Sequence[jax.Array], v: Sequence[jax.Array], *, clip: Any, adam: Adam, interpret: bool = False) -> Any:
    """(Σ d², Σ (c g) d) of the current-moment direction."""
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (clip, adam.b2, adam.eps, 1 / adam.correction)])
    parts = [_norm(*pair, scalars, interpret) for pair in zip(packed(g), packed(v), strict=True)]
    return tuple(sum(jnp.sum(x) for x in column) for column in zip(*parts, strict=True))


def _norm(g: jax.Array, v: jax.Array, scalars: jax.Array, interpret: bool) -> Any:
    rows, columns = g.shape
    step = _rows(rows, columns)

    def kernel(scalars, g, v, sumsq, dot):
        @pl.when(pl.program_id(0) == 0)
        def _():
            sumsq[...] = jnp.zeros_like(sumsq)
            dot[...] = jnp.zeros_like(dot)

        clip, b2, eps, scale = (scalars[i] for i in range(4))
        left = rows - pl.program_id(0) * step
        cg = clip * g[...]
        d = cg / (jnp.sqrt((b2 * v[...] + (1 - b2) * cg * cg) * scale) + eps)
        if rows % step:
            inside = jax.lax.broadcasted_iota(jnp.int32, d.shape, 0) < left
            d, cg = jnp.where(inside, d, 0), jnp.where(inside, cg, 0)
        sumsq[...] += jnp.sum((d * d).reshape(-1, 8, columns), axis=0)
        dot[...] += jnp.sum((cg * d).reshape(-1, 8, columns), axis=0)

    block = pl.BlockSpec((step, columns), lambda i: (i, 0))
    total = pl.BlockSpec((8, columns), lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=(-(-rows // step),),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, block],
        out_specs=[total, total],
        out_shape=[jax.ShapeDtypeStruct((8, columns), jnp.float32)] * 2,
        interpret=interpret,
        name="trial_norm",
    )(scalars, g, v)


def adamw(theta: Any, g: Any, m: Any, v: Any, *, step: Any, lr: Any, clip: Any, interpret: bool = False) -> Updated:
    """As `fsam_kernels.xla.adamw` with β 0.9/0.95 and weight decay 1e-4."""
    b1, b2, eps, decay = 0.9, 0.95, 1e-8, 1e-4
    t = jnp.asarray(step, jnp.float32)
    first, second = (-jnp.expm1(t * math.log(b)) for b in (b1, b2))
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (clip, lr, 1 / first, 1 / second)])

    def kernel(scalars, theta, g, m, v, theta_new, m_new, v_new):
        clip, lr, first, second = (scalars[i] for i in range(4))
        cg = clip * g[...]
        m_new[...] = b1 * m[...] + (1 - b1) * cg
        v_new[...] = b2 * v[...] + (1 - b2) * cg * cg
        moved = m_new[...] * first / (jnp.sqrt(v_new[...] * second) + eps)
        theta_new[...] = theta[...] - lr * (moved + decay * theta[...])

    def one(*arrays: jax.Array) -> Any:
        rows, columns = arrays[0].shape
        size = _rows(rows, columns)
        block = pl.BlockSpec((size, columns), lambda i: (i, 0))
        return pl.pallas_call(
            kernel,
            grid=(-(-rows // size),),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[block] * 4],
            out_specs=[block] * 3,
            out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)] * 3,
            input_output_aliases={1: 0, 3: 1, 4: 2},
            interpret=interpret,
            name="trial_adamw",
        )(scalars, *arrays)

    new = [one(*arrays) for arrays in zip(*map(packed, (theta, g, m, v)), strict=True)]
    return Updated(*(unpacked(column, theta) for column in zip(*new, strict=True)))


def _rows(rows: int, columns: int) -> int:
    """Rows of a block: a multiple of 8, which divides the rows where possible."""
    most = max(8, BLOCK_BYTES // (4 * columns) // 8 * 8)
    return next((x for x in range(min(most, rows // 8 * 8), 0, -8) if rows % x == 0), most)


def program(operation: str, shapes: Sequence[Sequence[int]]) -> Any:
    """As `parameters.program`, for the trial's kernels."""
    run: Any
    if operation == "preconditioned norm":
        run = lambda g, v, clip, correction: norm(g, v, clip=clip, adam=Adam(0.95, 1e-8, correction))
    else:
        run = lambda theta, g, m, v, step, lr, clip: adamw(theta, g, m, v, step=step, lr=lr, clip=clip)
    return run, parameters.program(operation, shapes)[1]


def compare(chip: str, shapes: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The figures of `parameters.read` for XLA's loops and for the trial's kernels, of the norm and of AdamW."""
    found = []
    for operation in ("preconditioned norm", "adamw"):
        found.append(parameters.read(chip, operation, shapes))
        found.append(parameters.read(chip, operation, shapes, "parameter_trial:program"))
        found[-1]["operation"] += ", Pallas"
    return found


@dataclass(frozen=True)
class TrialOptions:
    """Compile the norm and AdamW over the tensors of a model for a TPU, by XLA alone and with the trial's kernels."""

    chip: str = "v5e"
    """v4, v5e, v5p, v6e or tpu7x"""
    model: str = "24m"
    """24m, 118m, 1208m or gpt2"""


def main() -> None:
    options = tyro.cli(TrialOptions)
    if options.model not in WEIGHTS:
        sys.exit(f"--model: {options.model!r} is not known; use {', '.join(WEIGHTS)}")
    try:
        found = compare(options.chip, WEIGHTS[options.model])
    except UserError as error:
        sys.exit(f"parameter_trial: error: {error}")
    Console(width=150).print(parameters.table(found, options.model))


if __name__ == "__main__":
    main()
