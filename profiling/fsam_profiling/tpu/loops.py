"""The schedules of XLA's own loops of element-wise work and sums, read like those of Pallas kernels.

XLA's own estimate of such a loop and the figure of a Pallas kernel (`compiler.Kernel.cycles`) are not comparable: the
estimate grants a bare copy 1.2 to 1.3 times its bytes over the bandwidth, while a kernel is assumed to hide its copies
completely. Here a loop is judged as a kernel is, by the larger of its schedule and its bytes over the bandwidth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsam_core.errors import UserError
from fsam_profiling.tpu import hlo, schedules

_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
# Loops that are no fusion.
_ALONE = frozenset(("copy", "convert", "negate", "reshape", "reduce", "broadcast", "transpose"))
_TILE = re.compile(r'"output_window_bounds":\[([^\]]*)\]')


@dataclass(frozen=True)
class Loop:
    """One fused loop; cycles and bytes are of one run.

    Attributes:
        region: as `hlo.Counted.region`.
        issued: bundles of its schedule; None where the compiler left no schedule, or one with a loop whose length
            depends on data (copies of a window's ragged end). XLA's estimate then stands for it.
        estimate: XLA's own cycles.
        bytes: between HBM and the core, without what was copied to VMEM beforehand.
        bytes_cycles: those over the bandwidth.
    """

    name: str
    region: str
    issued: int | None
    estimate: int
    bytes: int
    bytes_cycles: int

    @property
    def cycles(self) -> int:
        return max(self.estimate if self.issued is None else self.issued, self.bytes_cycles)


def read_loops(text: str, dumps: Path, bytes_per_cycle: float) -> tuple[Loop, ...]:
    """The loops of a compiled program's entry computation, in the order they run.

    Products, with whatever is fused into them, and instructions inside a `while` are not among them: XLA's estimate
    stands for those.

    Args:
        text: `compiled.as_text()`.
        dumps: folder of the compiler's dumps.

    Raises:
        UserError: where a dump is of another format, or no loop has one.
    """
    computations, entry = hlo.computations_of(text)
    body = computations[entry]
    counted = {x.name: x for x in hlo.read(text).counted if not x.excluded}
    is_loop = lambda x: x.opcode in _ALONE or (x.opcode == "fusion" and "kind=kLoop" in x.text)
    loops = [x for x in body.values() if x.name in counted and is_loop(x) and _BOUNDS.search(x.text)]
    # The compiler dumps one of the loops that differ in their names alone.
    dumped = {_kind(computations, body, x): x.name for x in loops if schedules.has(dumps, x.name)}
    if loops and not dumped:
        raise UserError(f"tpu: the compiler left no schedule of {loops[0].name}, nor of any loop in {dumps}")
    found = []
    known: dict[tuple[str, tuple[int, ...]], int | None] = {}
    for one in loops:
        source, bounds = dumped.get(_kind(computations, body, one)), _numbers(_BOUNDS, one.text)
        if source is not None and (source, bounds) not in known:
            known[source, bounds] = _issued(schedules.file(dumps, source, "final_bundles"), bounds, source)
        issued = None if source is None else known[source, bounds]
        it = counted[one.name]
        found.append(Loop(one.name, it.region, issued, it.cycles or 0, it.bytes, round(it.bytes / bytes_per_cycle)))
    return tuple(found)


def _issued(text: str, bounds: tuple[int, ...], name: str) -> int | None:
    bundles = schedules.bundles_of(text, name)
    try:
        issued, assumed = schedules.issued_of(bundles, bounds, name)
    except UserError:
        return None
    return None if assumed else int(issued.sum())


def _kind(computations: dict, body: dict, one: hlo.Instruction) -> Any:
    inside = computations[hlo.called(one, "calls")].values() if one.opcode == "fusion" else ()
    operands = tuple(body[x].type for x in one.operands if x in body)
    steps = tuple((x.opcode, x.type) for x in inside)
    return one.opcode, one.type, operands, steps, _numbers(_BOUNDS, one.text), _numbers(_TILE, one.text)


def _numbers(pattern: re.Pattern[str], text: str) -> tuple[int, ...]:
    match = pattern.search(text)
    return tuple(int(x) for x in re.findall(r"\d+", match[1])) if match else ()
