"""Cycles of a compiled TPU program, read from the text of its scheduled HLO.

The TPU compiler writes its own estimate beside every instruction that it schedules (`"estimated_cycles"`). Their sum
over the entry computation, loop bodies counted once an iteration, is the estimate for the program. The text has no
estimate for a Pallas kernel; `schedules` reads those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fsam_core.errors import UserError
from fsam_profiling import regions
from fsam_profiling.tpu.inserted import Inserted, inserted_kernel

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
# Instructions that take no time of the core: names for memory, starts and ends of copies that run beside it.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast copy-done slice-done after-all optimization-barrier "  # noqa: SIM905
    "partition-id replica-id async-start async-done async-update".split()
)
_FREE_TARGETS = frozenset(("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"))
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}


class Instruction(NamedTuple):
    """One line of a computation: its result type, opcode, operands' names and everything after the opening bracket."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool


class Counted(NamedTuple):
    """One scheduled instruction: cycles of one execution (None: the compiler gave none) and how often it runs.

    `region` is the part of a step that it belongs to (`regions.region`), by its own scope or its operands'.
    """

    name: str
    opcode: str
    region: str
    cycles: int | None
    times: int
    bytes: int
    excluded: bool

    @property
    def total(self) -> int:
        return (self.cycles or 0) * self.times


@dataclass(frozen=True)
class Kernel:
    """A call of a Pallas kernel: shapes of operands and results, which of them lie in HBM, how often it runs.

    `inserted` describes a kernel that the compiler put there by itself.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    in_hbm: tuple[bool, ...]
    times: int
    excluded: bool
    region: str
    inserted: Inserted | None


@dataclass
class Program:
    """The figures in the text of a compiled module."""

    counted: list[Counted] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    copied: int = 0

    @property
    def cycles(self) -> int:
        """Σ cycles × times, conditional branches (`regions.CONDITIONAL`) excluded."""
        return sum(x.total for x in self.counted if not x.excluded)

    @property
    def bytes(self) -> int:
        """Bytes between HBM and the core, of XLA instructions and copies beside them; conditional branches excluded."""
        return self.copied + sum(x.bytes * x.times for x in self.counted if not x.excluded)

    @property
    def excluded_cycles(self) -> int:
        """Σ cycles × times of the conditional branches alone, as if they ran every time."""
        return sum(x.total for x in self.counted if x.excluded)

    @property
    def unknown(self) -> list[Counted]:
        """Instructions that take time and carry no estimate."""
        return [x for x in self.counted if x.cycles is None]


def read(text: str) -> Program:
    """The scheduled program in `text`, which is `compiled.as_text()`.

    Raises:
        UserError: where the text is not what this version of the compiler writes, or the length of a loop is unknown.
    """
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise UserError("tpu: the compiled module is not a scheduled one, so its cycles cannot be summed")
    computations, entry = computations_of(text)
    program = Program()
    _count(computations, entry, 1, False, program)
    if not any(x.cycles is not None for x in program.counted) and not program.kernels:
        raise UserError("tpu: no instruction of the compiled module carries estimated_cycles; nothing can be summed")
    return program


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """Name -> (opcode, region of a step) of every instruction of a compiled module, of any platform."""
    computations, _ = computations_of(text)
    return {
        name: (one.opcode, _region(computations, body, one))
        for body in computations.values()
        for name, one in body.items()
    }


def each(text: str) -> Iterator[tuple[Instruction, int]]:
    """Every instruction of a compiled module of any platform, inside fusions too, and how often it runs.

    Loops inside conditional branches are excluded.

    Raises:
        UserError: as `read`.
    """
    computations, entry = computations_of(text)

    def inside(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        body = computations[name]
        for one in body.values():
            yield one, times
            if one.opcode == "while" and _is_excluded(one):
                continue
            trips = _trips(computations, body, one) if one.opcode == "while" else 1
            for called in re.findall(r"\b(?:body|to_apply|calls)=\{?%?([\w.\-]+)", one.text):
                yield from inside(called, times * trips)

    return inside(entry, 1)


def bytes_of(type_text: str) -> int:
    """Bytes of every array named in a result type."""
    return sum(_size(dtype, dims) for dtype, dims, _ in _SHAPE.findall(type_text))


def hbm_bytes_of(type_text: str) -> int:
    """The same for the arrays that lie in HBM: a layout without a memory space S(…)."""
    return sum(_size(dtype, dims) for dtype, dims, layout in _SHAPE.findall(type_text) if "S(" not in layout)


def _size(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int("".join(re.findall(r"\d+", dtype)[:1]) or 8)
    size = 1
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    return size * bits // 8


def computations_of(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    found: dict[str, dict[str, Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            current = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            entry = current if line.startswith("ENTRY ") else entry
            found[current] = {}
        elif current and (match := _INSTRUCTION.match(line)):
            root, name, type_text, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", _until_bracket(rest)))
            found[current][name] = Instruction(name, type_text, opcode, operands, rest, bool(root))
    if not entry:
        raise UserError("tpu: the compiled module has no ENTRY computation")
    return found, entry


def _until_bracket(rest: str) -> str:
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:i]
    return rest


def _count(computations: dict, name: str, times: int, excluded: bool, program: Program) -> None:
    body = computations[name]
    for one in body.values():
        is_excluded = excluded or _is_excluded(one)
        if one.opcode == "while":
            inside = called(one, "body")
            # A loop in a conditional branch has no known length; it counts as one iteration.
            trips = 1 if is_excluded else _trips(computations, body, one)
            _count(computations, inside, times * trips, is_excluded, program)
        elif one.opcode == "conditional":
            for branch in _branches(one):
                branch_excluded = any(_is_excluded(x) for x in computations[branch].values())
                _count(computations, branch, times, is_excluded or branch_excluded, program)
        elif one.opcode == "call":
            _count(computations, called(one, "to_apply"), times, is_excluded, program)
        elif one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.text:
            operands = [x for operand in one.operands for x in _SHAPE.findall(body[operand].type)]
            results = _SHAPE.findall(one.type)
            plain = lambda found: tuple(f"{dtype}[{dims}]" for dtype, dims, _ in found)
            in_hbm = tuple("S(" not in layout for *_, layout in (*operands, *results))
            inserted = inserted_kernel(one.text, [*plain(operands), *plain(results)])
            region = _region(computations, body, one)
            found = Kernel(one.name, plain(operands), plain(results), in_hbm, times, is_excluded, region, inserted)
            program.kernels.append(found)
        elif one.opcode in ("copy-start", "slice-start"):
            program.copied += 0 if is_excluded else _copied(body, one) * times
        elif not _is_free(one):
            estimate = _ESTIMATE.search(one.text)
            cycles = int(estimate[1]) if estimate else None
            moved = _moved(computations, body, one)
            region = _region(computations, body, one)
            program.counted.append(Counted(one.name, one.opcode, region, cycles, times, moved, is_excluded))


def _scope(one: Instruction) -> str:
    match = _SCOPE.search(one.text)
    return match[1] if match else ""


def _is_excluded(one: Instruction) -> bool:
    return regions.CONDITIONAL in _scope(one).split("/")


def _region(computations: dict, body: dict[str, Instruction], one: Instruction, depth: int = 8) -> str:
    """By its own scope, else that of an instruction fused in it, else its operands': a copy belongs to its source."""
    if found := regions.region(_scope(one)):
        return found
    inside = computations[called(one, "calls")].values() if one.opcode == "fusion" else ()
    named = [region for x in inside if (region := regions.region(_scope(x)))]
    if named:
        return named[-1]
    for name in one.operands if depth else ():
        before = _region(computations, body, body[name], depth - 1) if name in body else regions.OTHER
        if before != regions.OTHER:
            return before
    return regions.OTHER


def _moved(computations: dict, body: dict[str, Instruction], one: Instruction) -> int:
    """Bytes between HBM and the core: operands and results, or only the slice of them that is touched."""
    if one.opcode != "fusion":
        read = sum(hbm_bytes_of(body[x].type) for x in one.operands if x in body)
        return read + hbm_bytes_of(one.type)
    inside = computations[called(one, "calls")]
    total = 0
    for x in inside.values():
        if x.opcode == "parameter":
            outer = body[one.operands[int(x.text.partition(")")[0])]]
            total += min(hbm_bytes_of(outer.type), _touched(inside, x.name, bytes_of(x.type)))
    written = hbm_bytes_of(one.type)
    root = _through(inside, next(x for x in inside.values() if x.root))
    if root.opcode == "dynamic-update-slice":
        written = min(written, bytes_of(inside[root.operands[1]].type))
    return total + written


def _copied(body: dict[str, Instruction], one: Instruction) -> int:
    """Bytes of HBM that an asynchronous copy reads and writes; it takes no cycles of the core."""
    done = next((x for x in body.values() if x.opcode.endswith("-done") and one.name in x.operands), None)
    if done is None:
        return 0
    sides = (body[one.operands[0]].type, done.type)
    return sum(bytes_of(done.type) for side in sides if hbm_bytes_of(side))


def _touched(inside: dict[str, Instruction], name: str, whole: int) -> int:
    total = 0
    for user in (x for x in inside.values() if name in x.operands):
        if user.opcode == "bitcast":
            total += _touched(inside, user.name, whole)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += bytes_of(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place, not read
        else:
            return whole
    return total


def _through(inside: dict[str, Instruction], one: Instruction) -> Instruction:
    while one.opcode == "bitcast":
        one = inside[one.operands[0]]
    return one


def _is_free(one: Instruction) -> bool:
    if one.opcode in _FREE:
        return True
    if one.opcode == "custom-call":
        return any(f'custom_call_target="{x}"' in one.text for x in _FREE_TARGETS)
    # Scalars are computed beside the vector units; the compiler estimates none of them.
    return bytes_of(one.type) <= 8 and not _ESTIMATE.search(one.text)


def called(one: Instruction, role: str) -> str:
    match = re.search(rf"\b{role}=%([\w.\-]+)", one.text)
    if match is None:
        raise UserError(f"tpu: {one.opcode} {one.name} names no {role}; this text is of an unknown compiler")
    return match[1]


def _branches(one: Instruction) -> Iterator[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", one.text)
    if match:
        yield from re.findall(r"%([\w.\-]+)", match[1])
    else:
        yield called(one, "true_computation")
        yield called(one, "false_computation")


def _trips(computations: dict, around: dict[str, Instruction], loop: Instruction) -> int:
    """Iterations of a `while`: from its annotation, or from start, step and limit of its counter."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition, body = computations[called(loop, "condition")], computations[called(loop, "body")]
    test = next(x for x in condition.values() if x.root)
    problem = UserError(
        f"tpu: the number of iterations of loop {loop.name} is not in the compiled module; give it a fixed length"
    )
    if test.opcode != "compare" or "direction=LT" not in test.text:
        raise problem
    counter, limit = (condition[x] for x in test.operands)
    index = re.search(r"index=(\d+)", counter.text)
    if counter.opcode != "get-tuple-element" or index is None:
        raise problem
    k = int(index[1])
    start = _constant(around, around[loop.operands[0]].operands[k])
    step = _step(body, next(x for x in body.values() if x.root).operands[k])
    end = _constant(condition, limit.name)
    if start is None or not step or end is None:
        raise problem
    return max(0, -(-(end - start) // step))


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    one = computation.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = computation.get(one.operands[0])
    match = re.match(r"(-?\d+)\)", one.text) if one is not None and one.opcode == "constant" else None
    return int(match[1]) if match else None


def _step(body: dict[str, Instruction], name: str) -> int | None:
    one = body[name]
    while one.opcode in ("copy", "bitcast"):
        one = body[one.operands[0]]
    if one.opcode != "add":
        return None
    return next((value for x in one.operands if (value := _constant(body, x)) is not None), None)
