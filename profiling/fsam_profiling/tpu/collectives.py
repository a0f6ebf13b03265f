"""The collective operations of a sharded program, read from its compiled text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fsam_profiling.tpu import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation of the program, which runs `times`; each device holds its result, `arrays` of `bytes` together."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int

    @property
    def bytes(self) -> int:
        return sum(hlo.bytes_of(f"{dtype}[{','.join(map(str, shape))}]") for dtype, shape in self.arrays)

    @property
    def is_small(self) -> bool:
        """Whether it is of scalars only: losses, counts, norms."""
        return all(math.prod(shape) == 1 for _, shape in self.arrays)


def read(text: str) -> list[Collective]:
    """The collectives of a compiled program, those in loops counted once an iteration.

    Raises:
        UserError: as `hlo.each`.
    """
    found = []
    for one, times in hlo.each(text):
        kind, is_start = one.opcode.removesuffix("-start"), one.opcode.endswith("-start")
        if kind not in KINDS:
            continue
        arrays = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(one.type))
        # An asynchronous gather or exchange returns its operand beside its result.
        if is_start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]
        found.append(Collective(kind, arrays, times))
    return found


def totals(program: list[Collective]) -> dict[str, dict[str, int]]:
    """Kind -> the number of operations that a step runs, and the bytes of their results on a device."""
    kinds: dict[str, dict[str, int]] = {}
    for one in program:
        sums = kinds.setdefault(one.kind, {"operations": 0, "bytes": 0})
        sums["operations"] += one.times
        sums["bytes"] += one.times * one.bytes
    return kinds


def bytes_of(sums: dict[str, dict[str, int]], *kinds: str) -> int:
    """The bytes of these kinds together, from `totals`."""
    return sum(sums.get(kind, {}).get("bytes", 0) for kind in kinds)
