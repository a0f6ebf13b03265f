"""The launches of the Triton kernels of the parameter operations, at the shapes of real models.

`launches` calls an operation on tensors without storage, as `gpu.launches` does for the head, and adds the content of
the tables to each launch. The addresses in them identify the array that is touched: array k of the tensors occupies the
stretch of memory at REGION · (arguments + 1 + k), behind one stretch for each argument of the kernel; the scale has a
stretch of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fsam_kernels.options import CROSS_ENTROPY
from fsam_kernels.torch.adamw import Update
from fsam_kernels.torch.direction import Adam
from fsam_kernels.torch.rounding import Rounding
from fsam_kernels.triton import tables
from fsam_profiling.gpu.launches import Launch, recording

# By path: the package has functions of the same names.
_NAMES = ("preconditioned_norm", "perturb", "adamw", "lerp")
_MODULES = {name: import_module(f"fsam_kernels.triton.{name}") for name in _NAMES}
KERNELS = {
    "norm_chunk": _MODULES["preconditioned_norm"],
    "sum_partials": _MODULES["preconditioned_norm"],
    "perturb_chunk": _MODULES["perturb"],
    "adamw_chunk": _MODULES["adamw"],
    "lerp_chunk": _MODULES["lerp"],
}
# A few numbers a tensor, and a loop that the reader of machine code does not follow.
UNREAD = {"bias_corrections": _MODULES["adamw"]}
REGION = 1 << 40
ADAM = Adam(0.95, 1e-8, 0.5)
UPDATE = Update(1e-3, 0.9, 0.95, 1e-8, 0.1, 10)


class Operation(NamedTuple):
    """One call of the backend on all of a model's tensors, float32 unless its name says otherwise.

    Attributes:
        arrays: dtypes of a tensor's arrays, in the order in which the kernels have them.
        call: arrays -> runs it.
        least_bytes: of an element: each array's reads and writes.
    """

    name: str
    arrays: tuple[torch.dtype, ...]
    call: Callable[..., Any]
    least_bytes: int


F32, BF16 = torch.float32, torch.bfloat16


def _norm(g: list[Tensor], v: list[Tensor], **options: Any) -> None:
    _MODULES["preconditioned_norm"].preconditioned_norm(g, v, adam=[ADAM] * len(g), **options)


def _perturb(theta: list[Tensor], g: list[Tensor], v: list[Tensor], out: list[Tensor], **options: Any) -> None:
    scale = torch.empty((), device=g[0].device)
    _MODULES["perturb"].perturb(theta, g, v, scale, adam=[ADAM] * len(g), out=out, **options)


def _adamw(theta: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], *copy: Any, **options: Any) -> None:
    copies = copy[0] if copy else None
    _MODULES["adamw"].adamw(theta, g, m, v, [UPDATE] * len(g), copy=copies, **options)


def _adamw_or_skip(*arrays: Any) -> None:
    _adamw(*arrays, found_inf=torch.empty((), device=arrays[0][0].device))


def _lerp(y: list[Tensor], x: list[Tensor]) -> None:
    _MODULES["lerp"].lerp_(x, y, torch.empty((), device=x[0].device))


def _with(call: Callable[..., None], **options: Any) -> Callable[..., None]:
    return lambda *arrays: call(*arrays, **options)


_RANDOM = Rounding(stochastic=True, seed=1, step=1)
OPERATIONS = (
    Operation("preconditioned_norm", (F32, F32), _norm, 8),
    Operation("preconditioned_norm, of g too", (F32, F32), _with(_norm, gradient=True), 8),
    Operation("preconditioned_norm, bfloat16 g", (BF16, F32), _norm, 6),
    Operation("perturb", (F32, F32, F32, F32), _perturb, 16),
    Operation("perturb to bfloat16", (F32, F32, F32, BF16), _perturb, 14),
    Operation("perturb to bfloat16 at random", (F32, F32, F32, BF16), _with(_perturb, rounding=_RANDOM), 14),
    Operation("adamw", (F32, F32, F32, F32), _adamw, 28),
    Operation("adamw, bfloat16 copy", (F32, F32, F32, F32, BF16), _adamw, 30),
    Operation("adamw, bfloat16 copy, or skipped on the device", (F32, F32, F32, F32, BF16), _adamw_or_skip, 30),
    Operation(
        "adamw, bfloat16 moments and copy at random", (F32, F32, BF16, BF16, BF16), _with(_adamw, rounding=_RANDOM), 22
    ),
    Operation("lerp", (F32, F32), _lerp, 12),
)


def launches(operation: Operation, shapes: Sequence[tuple[int, ...]], *, lanes: int = 32) -> list[Launch]:
    """The launches of one call on tensors of these shapes, in order, with the content of their tables.

    Args:
        lanes: of a warp of the card: 64 on AMD's, where half as many warps have as many threads.
    """
    lists = [[torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for dtype in operation.arrays]
    elements = sum(x.numel() for x in lists[0])

    def described(name: str) -> dict[str, Any]:
        least = 0 if name == "sum_partials" else elements * operation.least_bytes
        return {"rows": 1, "columns": elements, "loss": CROSS_ENTROPY, "least_bytes": least, "bulk": ()}

    own = tables.WARPS
    try:
        tables.WARPS = tables.BLOCK // (8 * lanes)
        with recording(KERNELS, described) as found:
            operation.call(*lists)
    finally:
        tables.WARPS = own
    return [dataclasses.replace(launch, tables=_tables(launch, lists)) for launch in found]


def _tables(launch: Launch, lists: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    sizes = np.array([x.numel() for x in lists[0]])
    chunks, first = tables.layout([-(-int(n) // tables.BLOCK) for n in sizes])
    if launch.kernel == "sum_partials":
        return {"first_ptr": np.array([0, len(chunks)]) if launch.integers["segments"] == 1 else first}
    arguments = sum(name not in launch.constants for name in launch.fn.arg_names)
    table = np.zeros((len(sizes), tables.WIDTH), dtype=np.int64)
    for k, column in enumerate(lists):
        room = -(-sizes * column[0].element_size() // 256) * 256
        table[:, k] = (arguments + 1 + k) * REGION + np.concatenate([[0], np.cumsum(room)[:-1]])
    table[:, tables.LENGTH], table[:, tables.ALIGNED] = sizes, 1
    table[:, tables.SCALE] = (arguments + 1 + tables.SCALE) * REGION
    return {"table_ptr": table, "chunks_ptr": chunks}
