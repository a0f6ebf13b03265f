"""Kernels that the TPU compiler inserts by itself, such as the "online-softmax" that it makes of attention.

They are Pallas kernels without a `pallas_call` in the traced function. Their grid and blocks are read from the kernel's
own code, which the compiled module carries as text.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import NamedTuple

import numpy as np


class Inserted(NamedTuple):
    """The grid, and the bytes that the blocks of each operand and result move over it; None where unknown."""

    grid: tuple[int, ...]
    moved: tuple[int | None, ...]


def inserted_kernel(text: str, shapes: list[str]) -> Inserted | None:
    """Grid and bytes of the kernel that an instruction calls; None where its code is not given as text.

    Args:
        text: the instruction's, from its opening bracket.
        shapes: of its operands and results, as `f32[64,128,128]`.
    """
    body = re.search(r'"body":"([A-Za-z0-9+/=]+)"', text)
    try:
        code = base64.b64decode(body[1]).decode() if body else ""
    except (binascii.Error, UnicodeDecodeError):
        return None  # compact bytecode: a kernel of a `pallas_call`
    bounds = re.search(r"iteration_bounds = array<i64(?:: ([\d, ]+))?>", code)
    windows = re.findall(r"transform_indices = @(\w+), window_bounds = array<i64: ([\d, ]+)>", code)
    if bounds is None or len(windows) != len(shapes):
        return None
    grid = tuple(int(x) for x in (bounds[1] or "").split(",") if x.strip())
    moved = [_moved(code, name, window, grid, shape) for (name, window), shape in zip(windows, shapes, strict=True)]
    return Inserted(grid, tuple(moved))


def _moved(code: str, name: str, window: str, grid: tuple[int, ...], shape: str) -> int | None:
    """Bytes copied for one array: its block's part inside the array, each time the index changes over the grid."""
    function = re.search(rf"func\.func @{name}\((.*?)\).*?\{{(.*?)\n  \}}", code, re.S)
    array = re.fullmatch(r"([a-z]+)(\d+)\[([\d,]*)\]", shape)
    if function is None or array is None:
        return None
    constants = {k: int(v) for k, v in re.findall(r"%(\w+) = arith\.constant (-?\d+) : i32", function[2])}
    returned = re.search(r"return ([^:]*) :", function[2])
    at = np.unravel_index(np.arange(int(np.prod(grid, dtype=np.int64))), grid) if grid else ()
    columns = []
    for one in (x.strip().lstrip("%") for x in returned[1].split(",")) if returned else ():
        argument = re.fullmatch(r"arg(\d+)", one)
        if argument and int(argument[1]) < len(grid):
            columns.append(at[int(argument[1])])
        elif one in constants:
            columns.append(np.full(len(at[0]) if at else 1, constants[one]))
        else:
            return None  # a computed index
    sizes, dims = [int(x) for x in window.split(",")], [int(x) for x in array[3].split(",") if x]
    if not len(sizes) == len(dims) == len(columns):
        return None
    index = np.stack(columns, axis=1)
    inside = np.ones(len(index), np.int64)
    for i, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        inside *= np.clip(dim - index[:, i] * size, 0, size)
    changed = np.concatenate([[True], (index[1:] != index[:-1]).any(axis=1)])
    return int(inside[changed].sum()) * int(array[2]) // 8
