"""The parameter work of a step, timed: `fsam profile parameters`.

What is timed is a step of preconditioned Functional-SAM with clipping, without its two passes through the model
(`parameter_steps`), by fsam and by two rivals, interleaved in one process; ratios are between neighbouring turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling import results
from fsam_trainers.console import Console
from fsam_trainers.tables import show


@dataclass(frozen=True)
class ParametersOptions:
    """Time the parameter work of a step, by fsam and as in a textbook SAM wrapper."""

    model: str = "24m"
    """whose tensors: 24m, 118m, 1208m or gpt2"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is a GPU, else cpu"""
    threads: int | None = None
    """of PyTorch on a CPU; default: its own choice"""
    repeats: int = 15
    """timed calls of each variant"""
    json: Path | None = None
    """also write the figures here"""


def run(options: ParametersOptions) -> int:
    """Measure, print two tables, write the file; 0.

    Raises:
        UserError: for a missing package, an unknown model, a missing GPU, and counts below 1.
    """
    backends.require("torch")
    import torch

    from fsam_profiling.timing import parameter_steps

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
    operations_timed = ours * len(parameter_steps.OPERATIONS) + (len(parameter_steps.KEPT) if device == "cpu" else 0)
    turns = (2 + options.repeats) * (len(parameter_steps.RIVALS) + ours + operations_timed)
    with Console().counting("timing", turns) as tick:
        rows, operations = parameter_steps.measure(shapes, device, options.repeats, tick)
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    elements = sum(math.prod(shape) for shape in shapes)
    about = {"model": options.model, "device": where, "tensors": len(shapes), "parameters": elements}
    about["repeats"] = options.repeats
    if options.json is not None:
        results.write(options.json, "parameters", [*rows, *operations], about)
    show(*tables(rows, operations, f"{options.model}, {elements / 1e6:,.1f} M weights, {where}"))
    return 0


def tables(rows: list[dict[str, Any]], operations: list[dict[str, Any]], title: str) -> list[Table]:
    """The variants, and fsam's operations; medians with the 20th and the 80th percentile."""
    spread = lambda row, name: f"{row[name]:.2f} ({row[f'{name}_p20']:.2f}–{row[f'{name}_p80']:.2f})"
    rivals = [name.removeprefix("to_") for name in rows[0] if name.startswith("to_") and "_p" not in name]
    steps = Table("variant", "ms", *(f"x {rival}" for rival in rivals), title=f"Parameter space of a step: {title}")
    for row in rows:
        steps.add_row(row["variant"], f"{row['ms']:,.1f}", *(spread(row, f"to_{rival}") for rival in rivals))
    parts = Table("backend", "operation", "ms", "least GB/s", "x copy of the weights", title="Its operations")
    for row in operations:
        figures = (f"{row['ms']:,.1f}", f"{row['gigabytes_per_second']:,.1f}", spread(row, "to_copy"))
        parts.add_row(row["backend"], row["operation"], *figures)
    return [steps, parts]
