"""Every Triton kernel of the head at every shape, by the real compilers, without the card: `fsam profile gpu`.

Whose figures these are: registers, spills, shared memory, widths and matrix instructions are read from the machine code
(`code`); bytes are counted from the LLVM code that it was made from (`traffic`); occupancy follows from the
published limits of a multiprocessor. A floor is the least bytes over the card's published bandwidth: what no
implementation can beat, and not a timing. Where the card is present, the stages are also timed, with a cold and with a
warm L2 cache.

The rows of the file that `json` names (`results`), one for each stage, set of options and group of equal shapes:

    arch, card, triton   what it was compiled for, whose bandwidth, and Triton's version
    stage, options       name in `launches.STAGES`; "plain" or "all options"
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
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.testing
from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.options import Loss
from fsam_kernels.shapes import Head
from fsam_profiling.gpu import code, launches, traffic
from fsam_profiling.gpu.code import BY_NAME, CARDS, Code
from fsam_profiling.gpu.launches import Launch, Stage


def read(archs: Sequence[str], shape: str | None = None, dtype: str = "bfloat16") -> Iterator[dict[str, Any]]:
    """The rows of the file, in order, of one shape or of all.

    Raises:
        UserError: for a shape that is not known, under TRITON_INTERPRET, and for a compiler whose output cannot be
            read.
    """
    heads = launches.heads(shape)
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, under which Triton compiles nothing: unset it to profile kernels")
    logits_dtype = getattr(torch, dtype)
    compiled: dict[Any, Code] = {}
    for arch in archs:
        for stage in launches.STAGES:
            for name, loss in launches.LOSSES.items():
                for shapes, of_stage in _groups(stage, heads, logits_dtype, loss):
                    row = _stage(arch, stage, of_stage, compiled)
                    cold, warm = _timed(arch, stage, heads[shapes[0]], logits_dtype, loss)
                    yield {
                        "arch": arch,
                        "card": BY_NAME[arch].name,
                        "triton": triton.__version__,
                        "stage": stage.name,
                        "options": name,
                        "shapes": shapes,
                        "dtype": dtype,
                        **row,
                        "cold_us": cold,
                        "warm_us": warm,
                    }


def _groups(
    stage: Stage, heads: dict[str, Head], dtype: torch.dtype, loss: Loss
) -> list[tuple[list[str], list[Launch]]]:
    """Groups of shapes that launch the same machine code on equally many programs with the same integers."""
    groups: dict[Any, tuple[list[str], list[Launch]]] = {}
    for shape, head in heads.items():
        of_stage = launches.launches(stage, head, dtype, loss)
        key = tuple((x.specialisation, x.grid, tuple(x.integers.items())) for x in of_stage)
        if key:
            groups.setdefault(key, ([], of_stage))[0].append(shape)
    return list(groups.values())


def _stage(arch: str, stage: Stage, of_stage: list[Launch], compiled: dict[Any, Code]) -> dict[str, Any]:
    kernels = [_kernel(arch, launch, compiled) for launch in of_stage]
    first = of_stage[0]
    itemsize = 4 if first.signature["u_ptr"] == "*fp32" else 2
    least = stage.least_bytes(first.rows, first.columns, itemsize, first.loss)
    moved = sum(kernel["bytes"] for kernel in kernels)
    return {
        "rows": first.rows,
        "columns": first.columns,
        "bytes": moved,
        "least_bytes": least,
        "ratio": moved / least,
        "floor_us": 1e6 * least / BY_NAME[arch].bandwidth,
        "kernels": kernels,
    }


def _kernel(arch: str, launch: Launch, compiled: dict[Any, Code]) -> dict[str, Any]:
    key = (arch, launch.specialisation)
    if key not in compiled:
        compiled[key] = code.read(launch, arch)
    found = compiled[key]
    moved = traffic.count(launch, found.llvm, BY_NAME[arch].warp)
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "warps": launch.num_warps,
        "registers": found.registers,
        "spills": found.spills,
        "shared_bytes": found.shared,
        "occupancy": found.occupancy,
        "load_bytes": moved.load_width,
        "store_bytes": moved.store_width,
        "widest_load_bytes": found.widest_load,
        "widest_store_bytes": found.widest_store,
        "matrix": found.matrix,
        "bytes": moved.bytes,
        "least_bytes": launch.least_bytes,
        "ratio": moved.bytes / launch.least_bytes,
    }


def _timed(arch: str, stage: Stage, head: Head, dtype: torch.dtype, loss: Loss) -> tuple[float | None, float | None]:
    """(cold, warm) microseconds of one call, medians of three interleaved rounds; (None, None) without the card."""
    if arch not in present():
        return None, None
    call = stage.call(*launches.chunk(head, dtype, "cuda", loss), loss)
    rounds = [(triton.testing.do_bench(call, return_mode="median"), _warm(call)) for _ in range(3)]
    cold, warm = (1e3 * figures.median(each) for each in zip(*rounds, strict=True))
    return cold, warm


def _warm(call: Any, repeats: int = 20) -> float:
    """Milliseconds of one call among `repeats` in a row, each with the L2 cache as the call before left it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def present() -> tuple[str, ...]:
    """The names in `code.BY_NAME` of the card in this machine: its architecture, and its own where it has one."""
    if not torch.cuda.is_available():
        return ()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return (str(properties.gcnArchName).partition(":")[0],)
    own = tuple(name for name in BY_NAME.keys() - CARDS.keys() if name in properties.name.lower())
    return (f"sm_{properties.major}{properties.minor}", *own)


def table(found: list[dict[str, Any]]) -> Table:
    """One line a kernel, and one for a stage of several; widths in bytes a thread, shared memory in bytes."""
    first = found[0]
    bandwidth = BY_NAME[first["arch"]].bandwidth / 1e12
    title = f"{first['arch']} ({first['card']}, {bandwidth:g} TB/s), {first['dtype']} logits, Triton {first['triton']}"
    timed = any(row["cold_us"] is not None for row in found)
    result = Table("shapes", "options", "kernel", title=title)
    for name in ("chunk", "regs", "spills", "shared", "occup.", "load/store", "bytes/least", "floor us"):
        result.add_column(name, justify="right")
    for name in ("cold us", "warm us") if timed else ():
        result.add_column(name, justify="right")
    result.add_column("matrix")
    for row in found:
        more = f" +{len(row['shapes']) - 1}" if len(row["shapes"]) > 1 else ""
        head, chunk = [row["shapes"][0] + more, row["options"]], f"{row['rows']}×{row['columns']}"
        times = [f"{row[x]:,.1f}" if row[x] is not None else "" for x in ("cold_us", "warm_us")] if timed else []
        last = [f"{row['ratio']:.3f}", f"{row['floor_us']:,.1f}", *times]
        alone = len(row["kernels"]) == 1
        for kernel in row["kernels"]:
            cells = [kernel["kernel"], chunk, *(str(kernel[x]) for x in ("registers", "spills", "shared_bytes"))]
            cells += [f"{kernel['occupancy']:.0%}", f"{kernel['load_bytes'] or '–'}/{kernel['store_bytes'] or '–'}"]
            cells += last if alone else [f"{kernel['ratio']:.3f}", *[""] * (len(last) - 1)]
            result.add_row(*head, *cells, ", ".join(kernel["matrix"]))  # without any, the column is left out
        if not alone:
            result.add_row(*head, row["stage"], chunk, *[""] * 5, *last)
    return result
