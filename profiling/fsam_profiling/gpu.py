"""Every Triton kernel at every shape, from the real compilers, for a card that need not be here: `fsam profile gpu`.

Whose figures these are: registers, spills, shared memory, widths and matrix instructions are read from the machine code
(`gpu_code`); bytes are counted from the LLVM code that it was made from (`gpu_traffic`); occupancy follows from the
published limits of a multiprocessor. A floor is the least bytes over the card's published bandwidth: what no
implementation can beat, and not a timing. Where the card is present, the stages are also timed, with a cold and with a
warm L2 cache.

The rows of the file that `json` names (`results`), one for each stage, set of options and group of equal shapes:

    arch, card, triton   what it was compiled for, whose bandwidth, and Triton's version
    stage, options       name in `catalogue.STAGES`; "plain" or "all options"
    shapes               names in `shapes.HEADS` that launch the same code on as many programs
    rows, columns, dtype           of one chunk of logits
    bytes, least_bytes, ratio      of all launches of the stage; of any implementation of it; their quotient
    floor_us             least_bytes / bandwidth
    cold_us, warm_us     measured; null where the card is not present
    kernels              for each launch: kernel, grid, warps, registers, spills, shared_bytes, occupancy (0 to 1),
                         load_bytes and store_bytes (width of a thread's access on the full path, narrowest over the
                         arrays that hold logits or tile values; 0 where it has none), widest_load_bytes and
                         widest_store_bytes (in the machine code), matrix (instruction -> count), bytes, least_bytes,
                         ratio
"""

from __future__ import annotations

import statistics as figures
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.testing
from rich import box
from rich.console import Console
from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.options import Loss
from fsam_kernels.shapes import HEADS, WEIGHTS, Head
from fsam_kernels.triton import catalogue
from fsam_kernels.triton.catalogue import Launch, Stage
from fsam_profiling import gpu_code, gpu_parameters, gpu_traffic, results
from fsam_profiling.gpu_code import CARDS, Code


@dataclass(frozen=True)
class Gpu:
    """What the compilers make of every Triton kernel, on a machine without the card."""

    arch: str = "sm_90"
    """sm_80, sm_90, sm_100, sm_120, gfx942, or all of them: all"""
    what: Literal["head", "parameters", "step"] = "head"
    """the head's kernels, those of the parameter operations over all tensors of a model, or all of a step's together"""
    shape: str | None = None
    """one of the heads (or models) in `fsam_kernels.shapes`; all without it, of a step 24m"""
    only: str = "adamw,precond-functional-sam"
    """of a step: methods and savings as in `fsam profile step --only`, or all"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the logits"""
    json: Path | None = None
    """also write the figures here"""


def run(options: Gpu) -> int:
    """Print the table, write the file; the process's exit code.

    Raises:
        UserError: for an architecture or shape that is not known, under TRITON_INTERPRET, and for a compiler whose
            output cannot be read.
    """
    from fsam_profiling import gpu_step

    if options.what == "step":
        found = list(gpu_step.read(_archs(options), options.shape or "24m", options.only))
    else:
        found = list(read(options) if options.what == "head" else _parameters(options))
    show = {"head": table, "parameters": gpu_parameters.table, "step": gpu_step.table}[options.what]
    for arch in dict.fromkeys(row["arch"] for row in found):
        Console(width=140).print(show([row for row in found if row["arch"] == arch]))
    if options.json is not None:
        results.write(options.json, f"gpu {options.what}", found, {"arch": options.arch, "shape": options.shape})
    return 0


def read(options: Gpu) -> Iterator[dict[str, Any]]:
    """The objects of the file, in order."""
    archs = _archs(options)
    if options.shape is not None and options.shape not in HEADS:
        raise UserError(f"shape: {options.shape!r} is not known: use {', '.join(HEADS)}")
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, under which Triton compiles nothing: unset it to profile kernels")
    dtype = getattr(torch, options.dtype)
    heads = HEADS if options.shape is None else {options.shape: HEADS[options.shape]}
    compiled: dict[Any, Code] = {}
    for arch in archs:
        for stage in catalogue.STAGES:
            for name, loss in catalogue.LOSSES.items():
                for shapes, launches in _groups(stage, heads, dtype, loss):
                    row = _stage(arch, stage, launches, compiled)
                    cold, warm = _timed(arch, stage, heads[shapes[0]], dtype, loss)
                    yield {
                        "arch": arch,
                        "card": CARDS[arch].name,
                        "triton": triton.__version__,
                        "stage": stage.name,
                        "options": name,
                        "shapes": shapes,
                        "dtype": options.dtype,
                        **row,
                        "cold_us": cold,
                        "warm_us": warm,
                    }


def _archs(options: Gpu) -> list[str]:
    if options.arch not in ("all", *CARDS):
        raise UserError(f"arch: {options.arch!r} is not known: use all, {', '.join(CARDS)}")
    return list(CARDS) if options.arch == "all" else [options.arch]


def _parameters(options: Gpu) -> Iterator[dict[str, Any]]:
    if options.shape is not None and options.shape not in WEIGHTS:
        raise UserError(f"shape: {options.shape!r} is not known: use {', '.join(WEIGHTS)}")
    return gpu_parameters.read(_archs(options), WEIGHTS if options.shape is None else [options.shape])


def _groups(
    stage: Stage, heads: dict[str, Head], dtype: torch.dtype, loss: Loss
) -> list[tuple[list[str], list[Launch]]]:
    """Shapes that launch the same machine code on as many programs with the same integers."""
    groups: dict[Any, tuple[list[str], list[Launch]]] = {}
    for shape, head in heads.items():
        launches = catalogue.launches(stage, head, dtype, loss)
        key = tuple((x.specialisation, x.grid, tuple(x.integers.items())) for x in launches)
        if key:
            groups.setdefault(key, ([], launches))[0].append(shape)
    return list(groups.values())


def _stage(arch: str, stage: Stage, launches: list[Launch], compiled: dict[Any, Code]) -> dict[str, Any]:
    kernels = [_kernel(arch, launch, compiled) for launch in launches]
    first = launches[0]
    itemsize = 4 if first.signature["u_ptr"] == "*fp32" else 2
    least = stage.least_bytes(first.rows, first.columns, itemsize, first.loss)
    moved = sum(kernel["bytes"] for kernel in kernels)
    return {
        "rows": first.rows,
        "columns": first.columns,
        "bytes": moved,
        "least_bytes": least,
        "ratio": moved / least,
        "floor_us": 1e6 * least / CARDS[arch].bandwidth,
        "kernels": kernels,
    }


def _kernel(arch: str, launch: Launch, compiled: dict[Any, Code]) -> dict[str, Any]:
    key = (arch, launch.specialisation)
    if key not in compiled:
        compiled[key] = gpu_code.read(launch, arch)
    code = compiled[key]
    traffic = gpu_traffic.count(launch, code.llvm, CARDS[arch].warp)
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "warps": launch.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": code.shared,
        "occupancy": code.occupancy,
        "load_bytes": traffic.load_width,
        "store_bytes": traffic.store_width,
        "widest_load_bytes": code.widest_load,
        "widest_store_bytes": code.widest_store,
        "matrix": code.matrix,
        "bytes": traffic.bytes,
        "least_bytes": launch.least_bytes,
        "ratio": traffic.bytes / launch.least_bytes,
    }


def _timed(arch: str, stage: Stage, head: Head, dtype: torch.dtype, loss: Loss) -> tuple[float | None, float | None]:
    """(cold, warm) microseconds of one call of the stage, medians taken turn about; (None, None) without the card."""
    if present() != arch:
        return None, None
    call = stage.call(*catalogue.chunk(head, dtype, "cuda"), loss)
    rounds = [(triton.testing.do_bench(call, return_mode="median"), _warm(call)) for _ in range(3)]
    cold, warm = (1e3 * figures.median(each) for each in zip(*rounds, strict=True))
    return cold, warm


def _warm(call: Any, repeats: int = 20) -> float:
    """Milliseconds of one call among `repeats` in a row, which find in the L2 cache what the one before left there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def present() -> str | None:
    """The architecture of the card in this machine, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def table(found: list[dict[str, Any]]) -> Table:
    """One line a kernel, and one for a stage of several; widths in bytes a thread, shared memory in bytes."""
    first = found[0]
    title = (
        f"{first['arch']} ({first['card']}, {CARDS[first['arch']].bandwidth / 1e12:g} TB/s), {first['dtype']} logits, "
        f"Triton {first['triton']}. A floor is least bytes / bandwidth, not a timing."
    )
    timed = any(row["cold_us"] is not None for row in found)
    result = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for name in ("shapes", "chunk", "options", "kernel"):
        result.add_column(name, no_wrap=True)
    for name in ("regs", "spills", "shared", "occup.", "load/store", "matrix", "bytes/least", "floor us"):
        result.add_column(name, justify="right")
    for name in ("cold us", "warm us") if timed else ():
        result.add_column(name, justify="right")
    for row in found:
        more = f" +{len(row['shapes']) - 1}" if len(row["shapes"]) > 1 else ""
        head = [row["shapes"][0] + more, f"{row['rows']}×{row['columns']}", row["options"]]
        times = [f"{row[x]:,.1f}" if row[x] is not None else "" for x in ("cold_us", "warm_us")] if timed else []
        last = [f"{row['ratio']:.3f}", f"{row['floor_us']:,.1f}", *times]
        for kernel in row["kernels"]:
            cells = [kernel["kernel"], *(str(kernel[x]) for x in ("registers", "spills", "shared_bytes"))]
            cells += [f"{kernel['occupancy']:.0%}", f"{kernel['load_bytes'] or '–'}/{kernel['store_bytes'] or '–'}"]
            cells += [", ".join(kernel["matrix"]) or "none"]
            result.add_row(*head, *cells, *(last if len(row["kernels"]) == 1 else [f"{kernel['ratio']:.3f}"]))
        if len(row["kernels"]) > 1:
            result.add_row(*head, row["stage"], *[""] * 5, *last)
    return result
