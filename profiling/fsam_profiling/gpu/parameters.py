"""Resources and bytes of the compiled parameter kernels, over all tensors of a model.

The compilers and figures are those of `gpu.kernels`. Programs find their data through tables, whose contents the reader
knows, so the bytes of the tables and of every chunk are counted, ragged ones included. Programs with equally many
elements left do the same at other addresses, so one of each kind is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import triton
from rich.table import Table

from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.triton import tables
from fsam_profiling.gpu import code, llvm, parameter_launches, programs, traffic
from fsam_profiling.gpu.code import BY_NAME, CARDS, Code
from fsam_profiling.gpu.launches import Launch
from fsam_profiling.gpu.parameter_launches import Operation
from fsam_profiling.gpu.programs import REGION, Access

assert REGION == parameter_launches.REGION


def read(
    archs: Iterable[str] = CARDS,
    models: Iterable[str] = WEIGHTS,
    operations: Iterable[Operation] = parameter_launches.OPERATIONS,
) -> Iterator[dict[str, Any]]:
    """One object for each architecture, operation and model.

    arch, card, triton, operation, model, tensors, parameters; launches; bytes, least_bytes, ratio;
    bytes_per_parameter; floor_us; kernels: kernel, grid, warps, registers, spills, occupancy, load_bytes and
    store_bytes (a thread's narrowest, over the tensors' arrays, on the path of full chunks), bytes.

    Raises:
        UserError: under TRITON_INTERPRET, and for a compiler whose output cannot be read.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, under which Triton compiles nothing: unset it to profile kernels")
    compiled: dict[Any, Code] = {}
    models, operations = list(models), list(operations)
    for arch in archs:
        for operation in operations:
            for model in models:
                launches = parameter_launches.launches(operation, WEIGHTS[model], lanes=BY_NAME[arch].warp)
                kernels = [_kernel(arch, launch, compiled) for launch in launches]
                elements = launches[0].columns
                least, moved = elements * operation.least_bytes, sum(kernel["bytes"] for kernel in kernels)
                yield {
                    "arch": arch,
                    "card": BY_NAME[arch].name,
                    "triton": triton.__version__,
                    "operation": operation.name,
                    "model": model,
                    "tensors": len(WEIGHTS[model]),
                    "parameters": elements,
                    "launches": len(launches),
                    "bytes": moved,
                    "least_bytes": least,
                    "ratio": moved / least,
                    "bytes_per_parameter": moved / elements,
                    "floor_us": 1e6 * least / BY_NAME[arch].bandwidth,
                    "kernels": kernels,
                }


def table(found: list[dict[str, Any]]) -> Table:
    """One line an operation and model of one architecture."""
    first = found[0]
    title = f"{first['arch']} ({first['card']}), Triton {first['triton']}"
    result = Table("operation", "model", title=title)
    for name in ("parameters", "launches", "bytes each", "bytes/least", "regs", "spills", "load/store", "floor us"):
        result.add_column(name, justify="right")
    for row in found:
        kernels = row["kernels"]
        worst = [max(kernel[x] for kernel in kernels) for x in ("registers", "spills")]
        width = "/".join(str(kernels[0][x] or "–") for x in ("load_bytes", "store_bytes"))
        figures = [f"{row['bytes_per_parameter']:.2f}", f"{row['ratio']:.3f}", *map(str, worst), width]
        counts = [f"{row['parameters'] / 1e6:,.1f} M", str(row["launches"])]
        result.add_row(row["operation"], row["model"], *counts, *figures, f"{row['floor_us']:,.1f}")
    return result


def _kernel(arch: str, launch: Launch, compiled: dict[Any, Code]) -> dict[str, Any]:
    key = (arch, launch.specialisation)
    if key not in compiled:
        compiled[key] = code.read(launch, arch)
    found = compiled[key]
    moved, load, store = count(launch, found.llvm, BY_NAME[arch].warp)
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "warps": launch.num_warps,
        "registers": found.registers,
        "spills": found.spills,
        "occupancy": found.occupancy,
        "load_bytes": load,
        "store_bytes": store,
        "bytes": moved,
    }


def count(launch: Launch, text: str, wavefront: int) -> traffic.Traffic:
    """Bytes of the launch, and the widths of the tensors' arrays on the path of full chunks; 0 where there are none.

    Raises:
        Unreadable: from `programs`.
    """
    kernel = llvm.parse(text)
    names = [name for name in launch.fn.arg_names if name not in launch.constants]
    pointers = {name for name in names if launch.signature[name].startswith("*")}
    arguments = [(i + 1) * REGION if name in pointers else launch.integers.get(name) for i, name in enumerate(names)]
    flat = {names.index(name): np.ascontiguousarray(x).ravel() for name, x in launch.tables.items()}

    def contents(argument: int, offsets: Any) -> Any:
        table = flat.get(argument)
        return None if table is None else table[offsets // table.itemsize % len(table)]

    def program(number: int) -> list[Access]:
        return programs.run(kernel, arguments, number, launch.num_warps * wavefront, wavefront, contents)

    total, widths = 0, (0, 0)
    for left, (number, repeats) in _kinds(launch).items():
        accesses = program(number)
        total += repeats * traffic.bytes_touched(accesses)
        if left == tables.BLOCK:
            arrays = {a.argument for a in accesses if len(names) <= a.argument < len(names) + tables.SCALE}
            load, store = (traffic.full_width([accesses], arrays, store=store) for store in (False, True))
            widths = (load, store)
    return traffic.Traffic(total, *widths)


def _kinds(launch: Launch) -> dict[int, tuple[int, int]]:
    """Elements left, at most BLOCK -> (one such program, how many there are); each is its own kind without chunks."""
    if "chunks_ptr" not in launch.tables:
        return {-number: (number, 1) for number in range(launch.grid)}
    first = launch.integers["first"]
    chunks = launch.tables["chunks_ptr"][first : first + launch.grid].astype(np.int64)
    left = launch.tables["table_ptr"][chunks[:, 0], tables.LENGTH] - chunks[:, 1] * tables.BLOCK
    kinds, at, repeats = np.unique(np.minimum(left, tables.BLOCK), return_index=True, return_counts=True)
    return {int(k): (int(i), int(n)) for k, i, n in zip(kinds, at, repeats, strict=True)}
