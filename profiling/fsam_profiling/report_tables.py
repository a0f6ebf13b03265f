"""The tables of a profiling report: the columns of each kind of file, as plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fsam_profiling.regions import in_order
from fsam_profiling.timing.step import ratio_text
from fsam_profiling.tpu.collectives import bytes_of

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def _mega(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / 1e6:,.4g}"


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else str(row[name])


def _number(name: str, form: str = ",.4g") -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else format(row[name], form)


def _spills(row: Row) -> str:
    kernels = [x for x in row["kernels"] if not x.get("excluded")]
    return f"{sum(x['schedule']['spills'] for x in kernels):,}" if kernels else "–"


def _worst(name: str) -> Callable[[Row], str]:
    return lambda row: str(max(x[name] for x in row["kernels"]))


def _widths(row: Row) -> str:
    narrowest = lambda name: min((x[name] for x in row["kernels"] if x[name]), default="–")
    return f"{narrowest('load_bytes')}/{narrowest('store_bytes')}"


def _sent(*kinds: str) -> Callable[[Row], str]:
    return lambda row: amount(bytes_of(row["collectives"], *kinds) / 1e9)


_STEP: Columns = {"method": _text("method"), "saving or peer": _text("saving")}
_TPU: Columns = {
    "Mcycles": _mega("cycles"),
    "ms": lambda row: f"{1e3 * row['seconds']:,.4g}",
    "temporaries MB": _mega("temporary_bytes"),
    "peak MB": _mega("peak_bytes"),
    "MB moved": _mega("bytes"),
    "GFLOP": lambda row: f"{row['product_flops'] / 1e9:,.4g}",
    "spills": _spills,
}
COLUMNS: dict[str, Columns] = {
    "step": _STEP
    | {
        "framework": _text("framework"),
        "ms/step": _number("step_ms"),
        "20–80 %": lambda row: f"{amount(row['step_ms_p20'])}–{amount(row['step_ms_p80'])}",
        "tokens/s": _number("tokens_per_s", ",.0f"),
        "× AdamW (20–80 %)": lambda row: ratio_text(row, "ratio"),
        "FLOP use": _number("utilisation", ".0%"),
        "× PyTorch (20–80 %)": lambda row: (
            "" if row["framework"] == "torch" or row["to_torch"] is None else ratio_text(row, "to_torch")
        ),
        "peak MiB": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
    },
    "trace": {
        "framework": _text("framework"),
        **_STEP,
        "step ms": _number("step_ms"),
        "clock": _text("clock"),
    },
    "tpu step": _STEP
    | {"backend": _text("backend"), "× AdamW": _number("ratio", ".3f"), "× floor": _number("x_floor", ".2f")}
    | {
        "Mcycles by schedule": lambda row: amount(row["scheduled_cycles"] / 1e6),
        "× AdamW by schedule": _number("scheduled_ratio", ".3f"),
    }
    | _TPU,
    "tpu head": {"program": _text("program"), "backend": _text("backend")}
    | {"rows a chunk": _number("rows", ",d"), "× products": _number("ratio", ".3f")}
    | _TPU,
    "tpu scale": {"step": _text("row")}
    | {
        "peak GiB a chip": lambda row: amount(row["peak_bytes"] / 2**30),
        "× AdamW": _number("x_adamw", ".2f"),
        "temporaries GiB": lambda row: amount(row["temporary_bytes"] / 2**30),
        "GB gathered": _sent("all-gather"),
        "GB reduced": _sent("all-reduce", "reduce-scatter"),
    },
    "tpu parameters": {
        "operation": _text("operation"),
        "bytes a weight": _number("bytes_per_parameter"),
        "bytes/least": _number("ratio", ".3f"),
        "floor Mcycles": _mega("floor_cycles"),
        "by schedule": _mega("scheduled_cycles"),
        "by cost model": _mega("estimated_cycles"),
    },
    "gpu step": {
        "arch": _text("arch"),
        "shape": _text("shape"),
        "method": _text("method"),
        "saving": _text("saving"),
        "head MB": _mega("head_bytes"),
        "parameters MB": _mega("parameter_bytes"),
        "bytes/least": _number("ratio", ".3f"),
        "floor µs": _number("floor_us"),
    },
    "gpu head": {
        "arch": _text("arch"),
        "shapes": lambda row: ", ".join(row["shapes"]),
        "chunk": lambda row: f"{row['rows']}×{row['columns']}",
        "stage": _text("stage"),
        "options": _text("options"),
    },
    "gpu parameters": {
        "arch": _text("arch"),
        "operation": _text("operation"),
        "model": _text("model"),
        "bytes a weight": _number("bytes_per_parameter"),
    },
    "check": {
        "item": _text("item"),
        "figures": lambda row: ", ".join(f"{k} {v:,}" for k, v in row.items() if k != "item"),
    },
}
_GPU: Columns = {
    "bytes/least": _number("ratio", ".3f"),
    "floor µs": _number("floor_us"),
    "registers": _worst("registers"),
    "spills": _worst("spills"),
    "load/store bytes": _widths,
    "occupancy": lambda row: f"{min(x['occupancy'] for x in row['kernels']):.0%}",
}
COLUMNS["gpu head"] |= _GPU | {"cold µs": _number("cold_us"), "warm µs": _number("warm_us")}
COLUMNS["gpu parameters"] |= _GPU

_GPU_NOTES = (
    "From the real compilers' machine code; bytes are counted from the code.",
    "A floor is the least bytes over the card's published bandwidth, not a timing.",
)
_TPU_NOTE = (
    "Estimates, not timings: the TPU compiler's cost model for XLA's instructions, schedule or bytes over bandwidth "
    "for kernels. Memory is the compiler's own account."
)
# Whose the figures are, under each table.
NOTES: dict[str, tuple[str, ...]] = {
    "step": (
        "Timed on this machine, all variants interleaved in one process; medians.",
        "A ratio is printed where it is distinguishable from 1: where its 20th and 80th percentile are no further "
        "apart than it is from 1. Elsewhere the percentiles stand alone.",
    ),
    "trace": ("Timed on this machine under a profiler, which slows short steps down: read the shares.",),
    "tpu step": (
        _TPU_NOTE,
        "By schedule: XLA's element-wise loops, sums and copies are judged as kernels are.",
        "The floor is the program's products at the published peak, or its arguments and results once over the "
        "published bandwidth.",
    ),
    "tpu head": (_TPU_NOTE,),
    "tpu scale": ("The compiler's own account; what a sharded step gathers and reduces is counted in its program.",),
    "tpu parameters": (
        "Estimates, not timings: by schedule is the larger of a loop's bundles and its bytes over the published "
        "bandwidth, by cost model the compiler's own.",
    ),
    "gpu step": _GPU_NOTES,
    "gpu head": _GPU_NOTES,
    "gpu parameters": _GPU_NOTES,
    "check": ("Counts and compilers' estimates, as the regression guard holds them.",),
}


def amount(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(kind: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells): the columns of the kind that are not empty; for an unknown kind all fields of plain values."""
    columns = (COLUMNS.get(kind) or _plain(rows)) | _regions(kind, rows)
    cells = [[of(row) for of in columns.values()] for row in rows]
    held = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    names = list(columns)
    return [names[i] for i in held], [[line[i] for i in held] for line in cells]


def _regions(kind: str, rows: list[Row]) -> Columns:
    """A column for each region that any row has: milliseconds, or million cycles."""
    scale = 1e-6 if kind == "tpu step" else 1.0
    names = in_order({name: 0.0 for row in rows for name in row.get("regions") or ()})
    of = lambda name: lambda row: amount(scale * row["regions"][name]) if name in (row.get("regions") or ()) else ""
    return {name: of(name) for name in names}


def _plain(rows: list[Row]) -> Columns:
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, int | float | str | None)
    )
    of = lambda name: lambda row: f"{row[name]:,.4g}" if isinstance(row.get(name), float) else _text(name)(row)
    return {name.replace("_", " "): of(name) for name in names}
