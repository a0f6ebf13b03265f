"""What the devices of a sharded program send each other: its collective operations, read from the compiled text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fsam_profiling.tpu import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation of the program; it runs `times`, and each device holds its result of `bytes` in `arrays`."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int

    @property
    def bytes(self) -> int:
        return sum(hlo.bytes_of(f"{dtype}[{','.join(map(str, shape))}]") for dtype, shape in self.arrays)

    @property
    def is_small(self) -> bool:
        """Whether it is of single values only: losses, counts, norms."""
        return all(math.prod(shape) == 1 for _, shape in self.arrays)


def read(text: str) -> list[Collective]:
    """The collectives of a compiled program, those in loops counted as often as the loops turn.

    Raises:
        UserError: as `tpu_hlo.each`.
    """
    found = []
    for one, times in hlo.each(text):
        kind, is_start = one.opcode.removesuffix("-start"), one.opcode.endswith("-start")
        if kind not in KINDS:
            continue
        arrays = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(one.type))
        # An asynchronous gather or exchange gives what went in beside what comes out.
        if is_start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]
        found.append(Collective(kind, arrays, times))
    return found


def totals(program: list[Collective]) -> dict[str, dict[str, int]]:
    """Of each kind that occurs, how many operations a step runs and the bytes of their results on a device."""
    kinds: dict[str, dict[str, int]] = {}
    for one in program:
        sums = kinds.setdefault(one.kind, {"operations": 0, "bytes": 0})
        sums["operations"] += one.times
        sums["bytes"] += one.times * one.bytes
    return kinds


def bytes_of(sums: dict[str, dict[str, int]], *kinds: str) -> int:
    """The bytes of these kinds together, of what `totals` gives."""
    return sum(sums.get(kind, {}).get("bytes", 0) for kind in kinds)
