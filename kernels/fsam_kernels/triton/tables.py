"""Many tensors in one launch: tables of their addresses and settings, and the kernels' common functions.

A program processes one chunk of BLOCK elements of one tensor. `chunks` holds the tensor and the chunk's number, two
32-bit integers a chunk. The tensor's row of `table` holds 16 values of 8 bytes:

    0 … 4    addresses of the tensor's arrays            5    elements
    6        whether all addresses are multiples of 16   7    key of random rounding
    8 … 11   eight float32 settings                      12 … 14    three more keys
    15       address of the scale, or of the step count

`chunks` depends on the sizes alone, so it is sent once and stays on the device from step to step. So does `table`, a
few kilobytes, while addresses and settings stay what they were; otherwise it is sent, and the host does not wait. All
sizes are in the tables, so a tensor of another size compiles nothing. A full and aligned chunk takes a path without
masks, where loads and stores are 16 bytes wide; ragged ends and unaligned views move one element at a time.

A row and a chunk's entry are 5 sectors of 32 bytes: 1 % of the 16 KiB that the norm reads of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fsam_kernels.torch import rounding as rounds
from fsam_kernels.torch.direction import Adam, Entry, entries
from fsam_kernels.torch.rounding import Rounding

# Eight elements a thread: 16 bytes of the narrowest dtype. With sixteen, the update of 4096 elements by 8 warps took
# 160 registers on sm_90 and spilled with a bfloat16 copy. 4096 elements by 16 warps take 85 registers and leave one
# program a multiprocessor. 1024 by 4 doubles the tables' share of the bytes for the same registers.
BLOCK = 2048
WARPS = BLOCK // (8 * (64 if torch.version.hip else 32))
WIDTH = 16  # columns of `table`
LENGTH, ALIGNED, KEY, SETTINGS, MORE_KEYS, SCALE = 5, 6, 7, 8, 12, 15
MOST_SENT = 16  # tables that stay on devices: of a step's three operations, and of other shapes and streams
_sent: dict[Any, Tensor] = {}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Group(NamedTuple):
    """The tensors of one launch, whose arrays have the same dtypes.

    Attributes:
        types: Triton's dtypes; None for an array that is not given.
        tensors: their rows of the table.
        start, chunks: their range in the table of chunks.
    """

    types: tuple[Any, ...]
    tensors: range
    start: int
    chunks: int


class Plan(NamedTuple):
    """The launches of one operation on one device.

    Attributes:
        entries: in the order of the table's rows; they keep the arrays alive until the launch.
        first: [tensors + 1] int64, on the device: where each tensor's chunks start.
    """

    device: torch.device
    entries: list[Entry]
    groups: list[Group]
    table: np.ndarray
    chunks: Tensor
    first: Tensor


def plans(
    lists: Sequence[Sequence[Tensor] | None],
    adam: Sequence[Adam] | None = None,
    mask: Sequence[bool] | None = None,
    *,
    written: int = 0,
) -> list[Plan]:
    """One plan for each device; `lists` as in `fsam_kernels.torch.direction.entries`, at most five.

    Raises:
        ValueError: as `entries`, and for a dtype that the kernels do not support.
    """
    of_device: dict[torch.device, dict[Any, list[Entry]]] = {}
    for entry in entries(lists, adam, mask, written=written):
        given = [x for x in entry.arrays if x is not None]
        for x in given:
            if x.dtype not in TYPES:
                raise ValueError(f"tensors: the triton backend takes float32, bfloat16 and float16, got {x.dtype}")
        types = tuple(None if x is None else x.dtype for x in entry.arrays)
        of_device.setdefault(given[0].device, {}).setdefault(types, []).append(entry)
    return [_plan(device, groups) for device, groups in of_device.items()]


def _plan(device: torch.device, of_types: dict[Any, list[Entry]]) -> Plan:
    found = [entry for group in of_types.values() for entry in group]
    table = np.zeros((len(found), WIDTH), dtype=np.int64)
    for row, entry in zip(table, found, strict=True):
        pointers = [0 if x is None else x.data_ptr() for x in entry.arrays]
        row[: len(pointers)] = pointers
        row[LENGTH] = next(x for x in entry.arrays if x is not None).numel()
        row[ALIGNED] = all(pointer % 16 == 0 for pointer in pointers)
    counts = [triton.cdiv(int(n), BLOCK) for n in table[:, LENGTH]]
    groups: list[Group] = []
    tensor = chunk = 0
    for types, group in of_types.items():
        rows = range(tensor, tensor + len(group))
        size = sum(counts[rows.start : rows.stop])
        groups.append(Group(tuple(None if x is None else TYPES[x] for x in types), rows, chunk, size))
        tensor, chunk = rows.stop, chunk + size
    return Plan(device, found, groups, table, *_chunks(tuple(counts), device))


@functools.lru_cache(maxsize=16)
def _chunks(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensor and number of each chunk, start of each tensor's chunks), on the device."""
    chunks, first = layout(counts)
    return sent(chunks, device, wait=True), sent(first, device, wait=True)


@functools.lru_cache(maxsize=16)
def ends(chunks: int, device: torch.device) -> Tensor:
    """[0, chunks]: all chunks as one segment."""
    return sent(np.array([0, chunks]), device, wait=True)


def layout(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """([chunks, 2] int32, [tensors + 1] int64) of tensors with these numbers of chunks."""
    tensors = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return np.stack([tensors, np.arange(len(tensors)) - first[tensors]], axis=1).astype(np.int32), first


def sent(x: np.ndarray, device: torch.device, *, wait: bool = False) -> Tensor:
    """Copy to the device, through pinned memory so that the host does not wait; with `wait`, ready for every stream."""
    if device.type == "meta":
        return torch.empty(x.shape, dtype=torch.from_numpy(x[:0]).dtype, device=device)
    here = torch.from_numpy(x)
    if device.type != "cuda" or wait:
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)


def table(
    plan: Plan, settings: Sequence[Any], rounding: Rounding, streams: Sequence[str], *, changes: bool = False
) -> Tensor:
    """The table's rows with settings and keys, on the device, as int64.

    Args:
        settings: up to eight columns, each a number, or an array or device tensor with one value a tensor.
        streams: the names of the arrays that are rounded; the first key is in column 7, the others in 12 to 14.
        changes: whether a kernel changes what is sent, so that it is not for the next call.
    """
    floats = plan.table.view(np.float32)
    for i, column in enumerate(settings):
        if not isinstance(column, Tensor):
            floats[:, 2 * SETTINGS + i] = column
    if rounding.stochastic:
        for row, entry in zip(plan.table, plan.entries, strict=True):
            for at, stream in zip((KEY, *range(MORE_KEYS, SCALE)), streams, strict=False):
                low, high = rounds.keys(rounding, entry.place, stream)
                row[at] = np.array([low, high], dtype=np.uint32).view(np.int64)[0]
    there = sent(plan.table, plan.device) if changes else _on_device(plan)
    for i, column in enumerate(settings):
        if isinstance(column, Tensor):
            there.view(torch.float32)[:, 2 * SETTINGS + i] = column
    return there


def _on_device(plan: Plan) -> Tensor:
    """The table on the device: the same tensor as long as its content, addresses included, stays what it was.

    A stream has tables of its own, since columns that are computed on the device are written to them.
    """
    stream = torch.cuda.current_stream(plan.device).cuda_stream if plan.device.type == "cuda" else 0
    key = (plan.device, stream, plan.table.tobytes())
    if key not in _sent:
        while len(_sent) >= MOST_SENT:
            del _sent[next(iter(_sent))]
        _sent[key] = sent(plan.table, plan.device)
    else:
        _sent[key] = _sent.pop(key)  # the last to go
    return _sent[key]


def column(values: Sequence[Any], device: torch.device) -> Any:
    """The values as a float64 array, or as a float64 tensor on the device where one of them is on a device."""
    if not any(isinstance(x, Tensor) and x.device.type != "cpu" for x in values):
        return np.array([float(x) for x in values], dtype=np.float64)
    tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in values]
    return torch.stack([x.to(device) for x in tensors]).double()


def direction_settings(plan: Plan) -> list[Any]:
    """a, b and δ of d = c g / (sqrt(a v + b (c g)²) + δ); nothing for the plain direction."""
    adam = [entry.adam for entry in plan.entries if entry.adam is not None]
    if not adam:
        return []
    correction = column([one.correction for one in adam], plan.device)
    b2 = np.array([one.b2 for one in adam], dtype=np.float64)
    current = np.array([one.current for one in adam])
    a: Any = np.where(current, b2, 1.0)
    b: Any = np.where(current, 1 - b2, 0.0)
    if isinstance(correction, Tensor):
        a, b = (_constant(tuple(x), plan.device) for x in (a, b))
    return [a / correction, b / correction, np.array([one.eps for one in adam])]


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[values] float64, which stays on the device."""
    return sent(np.array(values, dtype=np.float64), device, wait=True)


def as_scalar(x: Tensor | float, device: torch.device) -> Tensor | None:
    """x as a float32 scalar on the weights' device; None for the number 1."""
    if isinstance(x, Tensor):
        return x.to(device, torch.float32)
    return None if x == 1 else sent(np.array([x], dtype=np.float32), device)


@triton.jit
def find(table_ptr, chunks_ptr, first, BLOCK: tl.constexpr):
    """(the tensor's row, the chunk's first element, elements from there to the tensor's end, whether it is aligned)."""
    chunk = chunks_ptr + 2 * (first + tl.program_id(0)).to(tl.int64)
    row = table_ptr + tl.load(chunk).to(tl.int64) * 16
    start = tl.load(chunk + 1).to(tl.int64) * BLOCK
    return row, start, tl.load(row + 5) - start, tl.load(row + 6)


@triton.jit
def load(row, COLUMN: tl.constexpr, start, left, kind: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """A chunk of the array in COLUMN, in float32."""
    at = tl.arange(0, BLOCK)
    ptr = tl.load(row + COLUMN).to(tl.pointer_type(kind)) + start
    x = tl.load(tl.multiple_of(ptr, 16) + at) if FULL else tl.load(ptr + at, mask=at < left, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store(row, COLUMN: tl.constexpr, start, left, x, kind: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    at = tl.arange(0, BLOCK)
    ptr = tl.load(row + COLUMN).to(tl.pointer_type(kind)) + start
    if FULL:
        tl.store(tl.multiple_of(ptr, 16) + at, x.to(kind))
    else:
        tl.store(ptr + at, x.to(kind), mask=at < left)


@triton.jit
def setting(row, NUMBER: tl.constexpr):
    return tl.load(row.to(tl.pointer_type(tl.float32)) + (16 + NUMBER))


@triton.jit
def scaled(g, clip_ptr):
    if clip_ptr is not None:
        g = g * tl.load(clip_ptr)
    return g


@triton.jit
def direction(cg, v, row):
    moment = setting(row, 0) * v + (setting(row, 1) * cg) * cg
    return tl.div_rn(cg, tl.sqrt_rn(moment) + setting(row, 2))


@triton.jit
def rounded(x, start, row, KEY_COLUMN: tl.constexpr, kind: tl.constexpr, BLOCK: tl.constexpr, RANDOM: tl.constexpr):
    """`x` itself, or randomly rounded to bfloat16; the hash is that of `fsam_kernels.spec`."""
    if RANDOM and kind == tl.bfloat16:
        at = start + tl.arange(0, BLOCK)
        key = tl.load(row + KEY_COLUMN)
        words = (at >> 1).to(tl.uint32) ^ key.to(tl.uint32)
        words = (words ^ (words >> 16)) * 0x85EBCA6B
        words = (words ^ (words >> 13) ^ (key >> 32).to(tl.uint32)) * 0xC2B2AE35
        words = words ^ (words >> 16)
        half = tl.where((at & 1) == 0, words & 0xFFFF, words >> 16)
        upper = ((x.to(tl.uint32, bitcast=True) + half) >> 16).to(tl.uint16)
        y = tl.where(x != x, tl.full((BLOCK,), 0x7FC0, tl.uint16), upper).to(tl.bfloat16, bitcast=True)
    else:
        y = x
    return y
