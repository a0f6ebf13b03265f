"""Whole training steps compiled for one core of a TPU, without the chip: `fsam profile tpu --what step`.

Temporaries, arguments and results are the compiler's own account of HBM. Cycles are its cost model's for XLA's
instructions, and the schedule's or the bytes' for kernels (`compiler`). Bytes are counted in the compiled program,
FLOPs in the traced one (`flops`). The floor is that of this program: its matrix products at the chip's published peak,
or every argument read and every result written once at its published bandwidth, whichever takes longer. Nothing is
measured on a chip.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fsam_core.errors import UserError
from fsam_profiling import results
from fsam_profiling.regions import in_order
from fsam_profiling.rows import programs
from fsam_profiling.tpu.compiler import TOPOLOGIES, Compiled, compile_for, to_json
from fsam_trainers.tables import show, show_lines

PROGRAMS = "fsam_profiling.tpu.step_programs:"
BATCH = 16  # sequences of a core by default
TEXTBOOK = ("adamw", "sam", "functional-sam")


@dataclass(frozen=True)
class TpuVariant:
    """A row: its names in the table, and how `step_programs` makes its program."""

    method: str
    saving: str
    backend: str
    function: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.saving, self.backend)))


def variants(only: str, backends: tuple[str, ...], **same: Any) -> list[TpuVariant]:
    """The requested rows, by method or saving as in `fsam profile step`, in each backend; then the textbook's.

    Args:
        only: names separated by commas; "textbook" for its three; "all" for everything.
        same: options that all programs share.

    Raises:
        UserError: for an unknown row.
    """
    names = {name.strip() for name in only.split(",") if name.strip()}
    textbook = bool(names & {"textbook", "all"})
    wanted = "" if "all" in names else ",".join(sorted(names - {"textbook"})) or "adamw"
    found = [
        TpuVariant(method, saving, backend, "step", same | {"method": method, "changes": changes, "backend": backend})
        for backend in backends
        for method, saving, changes in programs(wanted)
    ]
    for kind in TEXTBOOK if textbook else ():
        found.append(TpuVariant(kind, "textbook", "xla", "textbook", same | {"kind": kind}))
    return found


def compile_variant(chip: str, variant: TpuVariant, loops: bool = False) -> Compiled:
    """The program of one row, its state donated as the trainer does; with `loops`, their schedules too.

    Raises:
        UserError: as `compiler.compile_for`.
    """
    kernels: Any = True if loops or variant.backend == "pallas" else "if any"
    function = PROGRAMS + variant.function
    return compile_for(chip, function, options=variant.options, donate=(0,), kernels=kernels, loops=loops)


def row(chip: str, variant: TpuVariant, one: Compiled, base: Compiled) -> dict[str, Any]:
    """The figures of a step, and its ratio to the AdamW step `base`."""
    products, moved = floors(one)
    return {
        "chip_name": chip,
        "method": variant.method,
        "saving": variant.saving,
        "backend": variant.backend,
        "options": variant.options.get("changes"),
        "ratio": one.cycles / base.cycles,
        "floor_cycles": max(products, moved),
        "floor_products_cycles": products,
        "floor_bytes_cycles": moved,
        "x_floor": one.cycles / max(products, moved),
        "scheduled_ratio": one.scheduled_cycles / base.scheduled_cycles,
        **to_json(one),
    }


def floors(one: Compiled) -> tuple[float, float]:
    """Cycles of the products at the peak, and of arguments and results at the published bandwidth."""
    least = one.argument_bytes + one.output_bytes
    return one.product_flops / one.chip.flops_per_cycle, least / one.chip.bytes_per_cycle


def run(
    chip: str,
    only: str,
    backends: tuple[str, ...],
    path: Path | None,
    *,
    preset: str,
    batch: int | None,
    seq_len: int | None,
    vocab_size: int | None,
    dtype: str,
) -> int:
    """Compile, print, write; 0.

    Raises:
        UserError: for an unknown chip, preset or row, and as `compiler.compile_for`.
    """
    if chip not in TOPOLOGIES:
        raise UserError(f"--chip: {chip!r} is not known; use {', '.join(TOPOLOGIES)}")
    same = {
        "preset": preset,
        "batch": batch or BATCH,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "dtype": dtype,
    }
    rows: list[dict[str, Any]] = []
    bases: dict[str, Compiled] = {}
    for variant in variants(only, backends, **same):
        one = compile_variant(chip, variant, loops=True)
        # The textbook is compared with the AdamW step of the first backend.
        base = bases.setdefault(variant.backend if variant.function == "step" else backends[0], one)
        rows.append(row(chip, variant, one, base))
        print(f"compiled {variant.name}: {one.cycles / 1e6:,.1f} Mcycles", file=sys.stderr)
        if path is not None:  # after every row: an interruption loses none
            results.write(path, "tpu step", rows, {"chip": chip, **same})
    show(table(rows, f"{preset}, {same['batch']} sequences, compute in {dtype}"), regions(rows))
    show_lines(NOTE)
    return 0


NOTE = (
    "Estimates, not timings: Mcycles are of XLA's instructions by the compiler's cost model, of kernels by their "
    "schedule or by bytes over bandwidth; by schedule, XLA's element-wise loops, sums and copies are judged as kernels "
    "are, and its products by the cost model. Memory is the compiler's own account. A floor is this program's products "
    "at the published peak, or its arguments and results once over the published bandwidth."
)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """One line a program."""
    chip = rows[0]["chip"]
    result = Table(title=f"{title}: TPU {chip['name']}, one core at {chip['hertz'] / 1e9:.2f} GHz")
    for name in ("method", "saving", "backend"):
        result.add_column(name, no_wrap=True)
    ours = ("Mcycles", "x AdamW", "by schedule", "x AdamW", "x floor")
    for name in (*ours, "GFLOP", "MB moved", "temporaries MB", "peak MB", "spills"):
        result.add_column(name, justify="right")
    for row in rows:
        spills = sum(x["schedule"]["spills"] for x in row["kernels"] if not x["excluded"])
        result.add_row(
            row["method"],
            row["saving"],
            row["backend"],
            f"{row['cycles'] / 1e6:,.2f}",
            f"{row['ratio']:.2f}",
            f"{row['scheduled_cycles'] / 1e6:,.2f}",
            f"{row['scheduled_ratio']:.2f}",
            f"{row['x_floor']:.2f}",
            f"{row['product_flops'] / 1e9:,.0f}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['temporary_bytes'] / 1e6:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            str(spills) if row["kernels"] else "–",
        )
    return result


def regions(rows: list[dict[str, Any]]) -> Table:
    """Where the cycles go."""
    names = list(in_order({name: 0.0 for row in rows for name in row["scheduled_regions"]}))
    result = Table("program", title="Mcycles by region, by schedule")
    for name in names:
        result.add_column(name, justify="right")
    for row in rows:
        found = row["scheduled_regions"]
        cells = [f"{found[name] / 1e6:,.2f}" if name in found else "–" for name in names]
        result.add_row(" ".join(filter(None, (row["method"], row["saving"], row["backend"]))), *cells)
    return result
