"""The programs of the head alone, compiled for one core of a TPU: `fsam profile tpu --what head`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.shapes import ALL_HEADS
from fsam_profiling import results
from fsam_profiling.tpu.compiler import Compiled, compile_for, to_json
from fsam_trainers.tables import show, show_lines


def run(chip: str, head: str, backends: tuple[str, ...], rows: int, path: Path | None) -> int:
    """Compile, print, write; 0.

    Raises:
        UserError: as `compile_for`, and for an unknown head.
    """
    if head not in ALL_HEADS:
        raise UserError(f"--head: {head!r} is not known; use {', '.join(ALL_HEADS)}")
    shape = ALL_HEADS[head]
    same = dict(shape._asdict())
    programs: dict[str, tuple[str, dict[str, Any]]] = {"three matrix products": ("products", same)}
    if "xla" in backends:
        programs["log-softmax, autodiff"] = ("log_softmax", same)
    for backend in backends:
        programs[f"fsam {backend}"] = ("first_pass", same | {"backend": backend, "rows": rows})
    compiled = {
        name: compile_for(chip, f"fsam_profiling.tpu.head_programs:{function}", options=arguments)
        for name, (function, arguments) in programs.items()
    }
    if path is not None:
        figures = [{"program": name, **to_json(x)} for name, x in compiled.items()]
        results.write(path, "tpu head", figures, {"chip": chip, "head": head, **same})
    flops = 6 * shape.N * shape.D * shape.V
    print_tables(compiled, f"head {head}, N={shape.N} D={shape.D} V={shape.V}, bfloat16", flops)
    return 0


def print_tables(compiled: dict[str, Compiled], title: str, flops: float) -> None:
    """Print a table of the programs, and one of their Pallas kernels; `flops` are the least needed."""
    chip = next(iter(compiled.values())).chip
    floor = flops / chip.flops_per_cycle
    table = Table(
        "program", "Mcycles", "of it kernels", "ms", "x floor", "temporaries MB", "args + outputs MB", "no estimate"
    )
    table.title = f"{title}: TPU {chip.name}, one core at {chip.hertz / 1e9:.2f} GHz"
    for name, one in compiled.items():
        inside = sum(x.cycles * x.times for x in one.kernels if not x.excluded)
        table.add_row(
            name,
            f"{one.cycles / 1e6:.2f}",
            f"{inside / 1e6:.2f}" if one.kernels else "–",
            f"{one.seconds * 1e3:.2f}",
            f"{one.cycles / floor:.2f}",
            f"{one.temporary_bytes / 1e6:,.0f}",
            f"{(one.argument_bytes + one.output_bytes - one.aliased_bytes) / 1e6:,.0f}",
            str(len(one.unknown)),
        )
    show(table)
    if any(one.kernels for one in compiled.values()):
        show(_kernel_table(compiled))
    show_lines(
        f"floor: {flops / 1e9:,.0f} GFLOP at {chip.flops_per_second / 1e12:.0f} TFLOP/s = {floor / 1e6:.2f} Mcycles. "
        "Estimates, not timings: XLA's instructions by the compiler's cost model; kernels by their schedule, with the "
        "matrix units at their published peak, or by bytes over bandwidth, whichever is more."
    )


def _kernel_table(compiled: dict[str, Compiled]) -> Table:
    units = ("MXU", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")
    headings = ("kernel", "grid", "runs", "cycles", "schedule", "matrix units", "bytes", "spills", "VMEM MB")
    table = Table(*headings, *(f"{x} %" for x in units), title="Pallas kernels, cycles of one run")
    for name, one in compiled.items():
        for x in one.kernels:
            plan = x.schedule
            notes = " (excluded)" * x.excluded + " (upper bound)" * bool(plan.assumed)
            table.add_row(
                f"{name}: {x.name}{notes}",
                "x".join(map(str, x.grid)) or "1",
                str(x.times),
                f"{x.cycles:,}",
                f"{plan.issued:,}",
                f"{plan.mxu_cycles:,}",
                "unknown" if x.bytes_cycles is None else f"{x.bytes_cycles:,}",
                str(plan.spills),
                f"{plan.vmem_bytes / 2**20:.1f} of {one.chip.vmem_bytes / 2**20:.0f}",
                *(f"{100 * plan.use.get(unit, 0):.0f}" for unit in units),
            )
    return table
