"""The parameter operations over all tensors of a model on a TPU: `fsam profile tpu --what parameters`.

Each has two figures: XLA's cost model, which grants a bare copy 1.2 to 1.3 times its bytes over the bandwidth, and the
larger of schedule and bytes over the bandwidth, by which Pallas kernels are judged (`loops`). Neither is measured on a
running chip. The bytes are counted in the compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling import results
from fsam_profiling.tpu.compiler import compile_for
from fsam_trainers.tables import show, show_lines


class Operation(NamedTuple):
    """An operation over float32 weights: the least bytes a weight, and the donated arguments."""

    least_bytes: int
    donate: tuple[int, ...] = ()


OPERATIONS: dict[str, Operation] = {
    "norm of g": Operation(4),
    "preconditioned norm": Operation(8),
    "perturb": Operation(16),
    "perturb to bfloat16": Operation(14),
    "adamw": Operation(28, (0, 2, 3)),
    "adamw, bfloat16 copy": Operation(30, (0, 2, 3)),
}


def program(operation: str, shapes: Sequence[Sequence[int]]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, arguments) of one operation over weights of these shapes, for `compiler.compile_for`."""
    import jax
    import jax.numpy as jnp

    from fsam_kernels.xla import Adam, adamw, perturb, preconditioned_norm

    tree = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in shapes]
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    copy_dtype = jnp.bfloat16 if "bfloat16" in operation else None

    def norm(g: Any, v: Any, clip: jax.Array, correction: jax.Array) -> Any:
        return preconditioned_norm(g, v, clip=clip, adam=Adam(0.95, 1e-8, correction))

    def moved(theta: Any, g: Any, v: Any, scale: jax.Array, clip: jax.Array, correction: jax.Array) -> Any:
        return perturb(theta, g, v, scale, clip=clip, adam=Adam(0.95, 1e-8, correction), dtype=copy_dtype)

    def update(theta: Any, g: Any, m: Any, v: Any, step: jax.Array, lr: jax.Array, clip: jax.Array) -> Any:
        return adamw(theta, g, m, v, step=step, lr=lr, b2=0.95, weight_decay=1e-4, clip=clip, copy_dtype=copy_dtype)

    if operation == "norm of g":
        return lambda g: preconditioned_norm(g)[0], (tree,)
    if operation == "preconditioned norm":
        return norm, (tree, tree, scalar, scalar)
    if operation.startswith("perturb"):
        return moved, (tree, tree, tree, scalar, scalar, scalar)
    return update, (tree, tree, tree, tree, scalar, scalar, scalar)


def read(
    chip: str, operation: str, shapes: Sequence[Sequence[int]], programs: str = "fsam_profiling.tpu.parameters:program"
) -> dict[str, Any]:
    """The figures of one operation over weights of these shapes.

    chip, operation, tensors, parameters; bytes, least_bytes, ratio, bytes_per_parameter; floor_cycles (least bytes over
    the bandwidth); bundles (of all loops and kernels); scheduled_cycles and estimated_cycles, with their ratios to the
    floor; temporary_bytes; loops and kernels (how many of each), and of how many loops the bundles are XLA's estimate.

    Args:
        programs: "module:name" of the function that returns the program, called as `program` is.

    Raises:
        UserError: as `compiler.compile_for`.
    """
    how = OPERATIONS[operation]
    options = {"operation": operation, "shapes": [list(shape) for shape in shapes]}
    compiled = compile_for(chip, programs, options=options, donate=how.donate, loops=True)
    elements = sum(math.prod(shape) for shape in shapes)
    floor = elements * how.least_bytes / compiled.chip.bytes_per_cycle
    return {
        "chip": chip,
        "operation": operation,
        "tensors": len(shapes),
        "parameters": elements,
        "bytes": compiled.bytes,
        "least_bytes": elements * how.least_bytes,
        "ratio": compiled.bytes / (elements * how.least_bytes),
        "bytes_per_parameter": compiled.bytes / elements,
        "floor_cycles": round(floor),
        "bundles": sum(x.issued or x.estimate for x in compiled.loops)
        + sum(x.schedule.issued * x.times for x in compiled.kernels),
        "scheduled_cycles": compiled.scheduled_cycles,
        "scheduled_ratio": compiled.scheduled_cycles / floor,
        "estimated_cycles": compiled.cycles,
        "estimated_ratio": compiled.cycles / floor,
        "temporary_bytes": compiled.temporary_bytes,
        "loops": len(compiled.loops),
        "estimated_loops": sum(x.issued is None for x in compiled.loops),
        "kernels": len(compiled.kernels),
    }


def table(found: list[dict[str, Any]], model: str) -> Table:
    """One line an operation over the tensors of a model."""
    first = found[0]
    size = f"{model}, {first['tensors']} tensors, {first['parameters'] / 1e6:,.1f} M float32 weights"
    headings = (
        "operation",
        "bytes a weight",
        "bytes/least",
        "floor Mcycles",
        "bundles",
        "by schedule",
        "by cost model",
    )
    result = Table(*headings, "temporaries MB", "loops", title=f"TPU {first['chip']}: {size}")
    for row in found:
        result.add_row(
            row["operation"],
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['floor_cycles'] / 1e6:.3f}",
            f"{row['bundles'] / 1e6:.3f}",
            *(f"{row[f'{x}_cycles'] / 1e6:.3f} ({row[f'{x}_ratio']:.2f}x)" for x in ("scheduled", "estimated")),
            f"{row['temporary_bytes'] / 1e6:,.1f}",
            str(row["loops"] + row["kernels"]) + ("*" * bool(row["estimated_loops"])),
        )
    return result


def run(chip: str, model: str, path: Path | None) -> int:
    """Compile every operation for the chip, print the table, write the file; 0.

    Raises:
        UserError: as `read`, and for an unknown model.
    """
    if model not in WEIGHTS:
        raise UserError(f"--model: {model!r} is not known; use {', '.join(WEIGHTS)}")
    found = [read(chip, operation, WEIGHTS[model]) for operation in OPERATIONS]
    if path is not None:
        results.write(path, "tpu parameters", found, {"chip": chip, "model": model})
    show(table(found, model))
    show_lines(
        "floor: least bytes over the published bandwidth; bundles: issued by the core, one a cycle. Not timings: by "
        "schedule is the larger of a loop's bundles and its bytes over the bandwidth, by cost model the compiler's own "
        "estimate, which also stands for the bundles of a few loops in a row with a star."
    )
    return 0
