"""Bytes that one launch of a Triton kernel moves, counted from its generated code."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from fsam_profiling.gpu import llvm, programs
from fsam_profiling.gpu.launches import Launch
from fsam_profiling.gpu.programs import REGION, Access

SECTOR = 32  # the smallest number of bytes that memory moves


class Traffic(NamedTuple):
    """What a launch moves.

    Attributes:
        bytes: sectors of 32 bytes that each program touches, once for its loads and once for its stores, times 32.
        load_width, store_width: bytes a thread on the full path, the narrowest over the kernel's bulk arrays; 0 where
            it loads or stores none of them.
    """

    bytes: int
    load_width: int
    store_width: int


def count(launch: Launch, text: str, wavefront: int) -> Traffic:
    """Run the programs of the first row, which all rows repeat; the first and the last where a program has rows.

    Raises:
        Unreadable: from `programs`.
    """
    kernel = llvm.parse(text)
    names = [name for name in launch.fn.arg_names if name not in launch.constants]
    pointers = {name for name in names if launch.signature[name].startswith("*")}
    arguments = [
        (i + 1) * REGION if name in pointers else launch.integers.get(name)  # a float is never part of an address
        for i, name in enumerate(names)
    ]
    period = launch.grid // launch.rows if launch.grid % launch.rows == 0 else 1
    labels = names.index("labels_ptr") if "labels_ptr" in names else None

    def contents(argument: int, offsets: Any) -> Any:
        return offsets // 8 * 7919 % launch.columns if argument == labels else None

    def program(number: int) -> list[Access]:
        threads = launch.num_warps * wavefront
        return programs.run(kernel, arguments, number, threads, wavefront, contents)

    first = [program(i) for i in range(period)]
    last = [program(launch.grid - 1)] if period == 1 and launch.grid > 1 else []
    moved = (launch.grid - len(last)) // period * sum(map(bytes_touched, first)) + sum(map(bytes_touched, last))
    bulk = {names.index(name) for name in launch.bulk if name in names}
    return Traffic(moved, *(full_width(first, bulk, store=store) for store in (False, True)))


def bytes_touched(accesses: list[Access]) -> int:
    total = 0
    for store in (False, True):
        touched = [
            (a.addresses[:, None] + np.arange(0, max(a.width, 1), min(a.width, SECTOR))).ravel() // SECTOR
            for a in accesses
            if a.store == store
        ]
        total += SECTOR * len(np.unique(np.concatenate(touched))) if touched else 0
    return total


def full_width(runs: list[list[Access]], bulk: set[int], *, store: bool) -> int:
    """The narrowest access that carries a tenth of an array, in the program where it is widest: that of full chunks."""
    found = []
    for argument in bulk:
        widths = [_narrowest([a for a in each if a.argument == argument and a.store == store]) for each in runs]
        if any(widths):
            found.append(max(widths))
    return min(found, default=0)


def _narrowest(accesses: list[Access]) -> int:
    carried: dict[int, int] = defaultdict(int)
    for a in accesses:
        carried[a.width] += a.width * len(a.addresses)
    total = sum(carried.values())
    return min((width for width, size in carried.items() if size >= total / 10), default=0)
