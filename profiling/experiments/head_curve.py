"""Cycles and memory of the head on a TPU as a curve over the rows of a chunk.

    python profiling/experiments/head_curve.py

Loss, both gradients and the kept cotangent, by XLA alone and with the Pallas forward stage, are compared with the three
bare matrix products; the second pass through a kept or a recomputed cotangent is compared with its two. Everything is
compiled by the TPU's own compiler, without the chip; `tpu.compiler` says where the estimates come from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.shapes import HEADS
from fsam_profiling import results
from fsam_profiling.tpu.compiler import Compiled, compile_for, to_json

PROGRAMS = "fsam_profiling.tpu.head_programs:"


@dataclass(frozen=True)
class HeadCurveOptions:
    """Compile the head in chunks of several sizes for a TPU, and print cycles and temporaries of each."""

    chip: str = "v5e"
    """v4, v5e, v5p, v6e or tpu7x"""
    head: str = "reference"
    """shape: tiny, 2m, 24m, 43m, 118m, 1208m, reference, gpt2, llama3-8b"""
    rows: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """rows of a chunk"""
    backends: tuple[str, ...] = ("xla", "pallas")
    """whose forward stage"""
    json: Path | None = None
    """also write the figures here"""


def measure(options: HeadCurveOptions) -> list[dict[str, Any]]:
    """One row a program: its name, backend and chunk, the figures of `compiler.to_json`, its ratio to the products.

    Raises:
        UserError: as `compile_for`, and for an unknown head.
    """
    if options.head not in HEADS:
        raise UserError(f"--head: {options.head!r} is not known; use {', '.join(HEADS)}")
    shape = HEADS[options.head]._asdict()

    def figures(name: str, function: str, bare: Compiled | None, backend: str, rows: int, **how: Any) -> Any:
        kernels = backend == "pallas"
        if function in ("first_pass", "second_pass"):
            how |= {"backend": backend, "rows": rows}
        one = compile_for(options.chip, PROGRAMS + function, options=shape | how, kernels=kernels)
        ratio = one.cycles / (bare or one).cycles
        return one, {"program": name, "backend": backend, "rows": rows, "ratio": ratio, **to_json(one)}

    N = shape["N"]
    three, first = figures("three products", "products", None, "bare", N)
    two, second = figures("two products", "products", None, "bare", N, logits=False)
    found = [first, figures("log-softmax, autodiff", "log_softmax", three, "xla", N)[1]]
    chunks = [(backend, rows) for backend in options.backends for rows in options.rows]
    for backend, rows in chunks:
        found.append(figures("first pass", "first_pass", three, backend, rows)[1])
        found.append(figures("first pass, w̄ in float32", "first_pass", three, backend, rows, upcast_wbar=True)[1])
    found.append(second)
    for backend, rows in chunks:
        found.append(figures("second pass, kept", "second_pass", two, backend, rows)[1])
        found.append(figures("second pass, recomputed", "second_pass", two, backend, rows, keep=False)[1])
    return found


def main() -> None:
    options = tyro.cli(HeadCurveOptions, prog="python profiling/experiments/head_curve.py")
    try:
        rows = measure(options)
    except UserError as error:
        sys.exit(f"head_curve: error: {error}")
    size = HEADS[options.head]
    if options.json is not None:
        about = {"chip": options.chip, "head": options.head, **size._asdict()}
        results.write(options.json, "tpu head", rows, about, "head_curve")
    title = f"TPU {options.chip}, {options.head}: N={size.N} D={size.D} V={size.V}, bfloat16"
    headings = ["program", "backend", "rows a chunk", "Mcycles", "of it kernels", "x products"]
    table = Table(*headings, "temporaries MB", "spills", title=title)
    for row in rows:
        kernels = [x for x in row["kernels"] if not x["excluded"]]
        table.add_row(
            row["program"],
            row["backend"],
            f"{row['rows']:,}",
            f"{row['cycles'] / 1e6:.2f}",
            f"{sum(x['cycles'] * x['times'] for x in kernels) / 1e6:.2f}" if kernels else "–",
            f"{row['ratio']:.3f}",
            f"{row['temporary_bytes'] / 1e6:,.0f}",
            f"{max(x['schedule']['spills'] for x in kernels):,}" if kernels else "–",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
