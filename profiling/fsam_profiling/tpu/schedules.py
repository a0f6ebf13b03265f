"""The schedule of a Pallas kernel, read from the TPU compiler's low-level dumps.

A TPU core issues one bundle of instructions a cycle, so the bundles of a kernel, each counted as often as it is issued,
are the least cycles that it takes. `*-final_bundles.txt` is the schedule. How often a bundle is issued follows from the
loops and branches in it, whose scalar code is evaluated here for every step of the grid. A branch that cannot be
evaluated (it depends on data) is counted as running every time, and reported.
`*-final_hlo-static-per-bundle-utilization.txt` holds the used slots of each unit for every bundle. Both formats are
undocumented, so only the files of `VERSION` are read and others are refused.

The schedule alone flatters a kernel that is bound by its matrix units: it issues a bf16 product of 16 rows every 13 to
15 bundles on v5e, where the published peak allows one every 16 (a plain matmul then seems to run at 115 % of the peak).
Every stretch of `WINDOW` bundles therefore takes at least as many cycles as its products occupy the matrix units.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core.errors import UserError

VERSION = "0.0.42.1"
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*"
)
# The queue in front of a matrix unit is assumed to even out over so many bundles.
WINDOW = 256
# A branch is decided this many bundles before it takes effect.
_DELAY_SLOTS = 4
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:(?:LH|LB|LE|PB|PF|CT|SS|ST) ?)*:(?: >+)? +\{(.*)$")
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?)%(\w+)\))? target = \$region(\d+)")
_DEFINITION = re.compile(r"%([sp]\w+) = ([\w.]+) ([^;]*)")
_INDEX = re.compile(r"iteration index, stage = (\d+)(?: iter bound = (\d+))?")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Schedule:
    """The figures of a kernel's dumps.

    Attributes:
        bundles: of the whole program, each once.
        issued: bundles issued over all steps of the grid.
        cycles: issued, with the matrix units no faster than their peak.
        mxu_cycles: cycles that each matrix unit is busy at its peak.
        steps: of the grid.
        spills, fills: spilled vector registers stored and loaded, in the program text.
        vmem_bytes: on-chip memory that the kernel allocates: windows (twice where double-buffered) and scratch.
        use: unit -> used share of its slots, over the issued bundles.
        assumed: branches that depend on data and were counted as running every time.
    """

    bundles: int
    issued: int
    cycles: int
    mxu_cycles: int
    steps: int
    spills: int
    fills: int
    vmem_bytes: int
    use: dict[str, float]
    assumed: int


def check_version(version: str | None) -> None:
    """Refuse a compiler of another version than `VERSION`.

    Raises:
        UserError: naming both versions.
    """
    if version != VERSION:
        found = f"libtpu {version} is installed" if version else "libtpu is not installed"
        raise UserError(
            f"tpu: kernels are read from the dumps of libtpu {VERSION}, and {found}: pip install libtpu=={VERSION}"
        )


def read(folder: Path, kernel: str, grid: tuple[int, ...], mxus: int, row_cycles: float) -> Schedule:
    """The schedule of the instruction named `kernel`, called over `grid`.

    Args:
        folder: where the compiler wrote its dumps.
        kernel: name of the instruction in the compiled module.
        grid: as given to `pallas_call`.
        mxus: matrix units of a core.
        row_cycles: cycles of a matrix unit for one row of its left operand at the published peak, in bf16.

    Raises:
        UserError: where a file is missing or of another format.
    """
    text = file(folder, kernel, "final_bundles")
    bundles = bundles_of(text, kernel)
    capacity, used = _utilization(file(folder, kernel, "final_hlo-static-per-bundle-utilization"), kernel)
    if len(used) != len(bundles):
        raise _unreadable(kernel, f"{len(bundles)} bundles are scheduled, and {len(used)} are in the table of slots")
    issued, assumed = issued_of(bundles, grid, kernel)
    busy = np.array([_rows(text) for text in bundles]) * row_cycles / mxus
    cycles = _paced(issued, busy)
    share = issued @ used / (cycles * np.array(list(capacity.values())))
    share[list(capacity).index("MXU")] = issued @ busy / cycles
    names = dict(zip(capacity, range(len(capacity)), strict=True))
    return Schedule(
        bundles=len(bundles),
        issued=int(issued.sum()),
        cycles=round(cycles),
        mxu_cycles=round(float(issued @ busy)),
        steps=int(np.prod(grid, dtype=np.int64)),
        spills=int(used[:, names["VSTORE:SPILL"]].sum()),
        fills=int(used[:, names["VLOAD:FILL"]].sum()),
        vmem_bytes=_vmem(file(folder, kernel, "pre-finalize-registers-and-allocations")),
        use={name: float(share[i]) for name, i in names.items() if ":" not in name},
        assumed=assumed,
    )


def has(folder: Path, kernel: str) -> bool:
    """Whether the compiler left a schedule of the instruction named `kernel`."""
    return any(re.fullmatch(rf"\d+-{re.escape(kernel)}-\d+-final_bundles\.txt", path.name) for path in folder.iterdir())


def file(folder: Path, kernel: str, label: str) -> str:
    # <time stamp>-<instruction>-<number of the pass>-<label>.txt
    pattern = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{re.escape(label)}\.txt")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    if len(found) != 1:
        raise _unreadable(kernel, f"{len(found)} files *-{kernel}-*-{label}.txt instead of one")
    return found[0].read_text()


def _unreadable(kernel: str, why: str) -> UserError:
    return UserError(f"tpu: the compiler's dumps of kernel {kernel} cannot be read: {why}")


def bundles_of(text: str, kernel: str) -> list[str]:
    """The text of every bundle, in order of address."""
    bundles: list[str] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            if int(match[1], 16) != len(bundles):
                raise _unreadable(kernel, f"bundle {match[1]} stands where bundle {len(bundles):#x} is expected")
            bundles.append(match[2])
        elif bundles:
            if re.match(r"^ *(0x[0-9a-f]+) ", line):
                raise _unreadable(kernel, f"this line is not understood: {line.strip()[:60]!r}")
            bundles[-1] += "\n" + line
    if not bundles:
        raise _unreadable(kernel, "no bundle is found in it")
    return bundles


def _utilization(text: str, kernel: str) -> tuple[dict[str, int], np.ndarray]:
    lines = text.splitlines()
    if len(lines) < 4 or not lines[0].startswith("== CAP") or lines[3] != "== UTILIZATION:":
        raise _unreadable(kernel, "the table of slots has another head")
    names, sizes = [x.strip() for x in lines[1].split(",")], [int(x) for x in lines[2].split()]
    used = np.array([[int(x) for x in line.split()] for line in lines[4:]], dtype=np.int64)
    missing = {"MXU", "VALU", "VLOAD", "VSTORE", "VLOAD:FILL", "VSTORE:SPILL"} - set(names)
    if missing or used.ndim != 2 or used.shape[1] != len(names):
        raise _unreadable(kernel, "the table of slots has other columns")
    return dict(zip(names, sizes, strict=True)), used


def _vmem(text: str) -> int:
    found = dict(re.findall(r"#(allocation\d+) \[shape = [^\n]*?space=vmem, size = (0x[0-9a-f]+)", text))
    return sum(int(size, 16) for size in found.values())


def _rows(bundle: str) -> int:
    """Rows that the products of a bundle send through a matrix unit: a register holds 16 of bf16, 8 of float32."""
    return sum(16 if ".bf16" in name else 8 for name in re.findall(r"vmatmul\.[\w.]+", bundle))


def _paced(issued: np.ndarray, busy: np.ndarray) -> float:
    """Cycles of bundles that are issued `issued` times, each of which occupies the matrix units for `busy` cycles."""
    cycles, edges = 0.0, [0, *(np.flatnonzero(np.diff(issued)) + 1), len(issued)]
    for a, b in itertools.pairwise(edges):
        for start in range(a, b, WINDOW):
            stretch = slice(start, min(b, start + WINDOW))
            cycles += float(issued[a]) * max(stretch.stop - stretch.start, float(busy[stretch].sum()))
    return cycles


def issued_of(bundles: list[str], grid: tuple[int, ...], kernel: str) -> tuple[np.ndarray, int]:
    """How often each bundle is issued, and the number of branches that were assumed to run."""
    starts = {int(n): i for i, text in enumerate(bundles) for n in _STARTS.findall(text)}
    scalars = _Scalars(bundles, grid)
    loops: list[tuple[int, int, str, bool]] = []
    skips: list[tuple[int, int, str, bool]] = []
    for i, text in enumerate(bundles):
        for negated, predicate, region in _BRANCH.findall(text):
            if int(region) not in starts:
                raise _unreadable(kernel, f"a branch goes to region {region}, which is not marked")
            target = starts[int(region)]
            (loops if target <= i else skips).append((i, target, predicate, bool(negated)))
    steps: tuple[int, int] | None = None
    # The loop over the grid first: the length of another one may depend on the step.
    for i, target, predicate, _ in loops:
        trips, over_grid = scalars.trips(predicate)
        if over_grid and trips is not None:
            steps = (target, i + _DELAY_SLOTS + 1)
            scalars.over_grid(int(trips))
    iterated: list[tuple[int, int, Any]] = []
    for i, target, predicate, _ in loops:
        trips, over_grid = scalars.trips(predicate)
        if trips is None:
            raise _unreadable(kernel, f"the number of iterations of the loop that ends at bundle {i:#x} is unknown")
        if not over_grid:
            iterated.append((target, i + _DELAY_SLOTS + 1, np.broadcast_to(trips, scalars.iterations)))
    return _issued_in(len(bundles), steps, skips, iterated, scalars)


def _issued_in(
    bundles: int, steps: tuple[int, int] | None, skips: list, regions: list[tuple[int, int, Any]], scalars: _Scalars
) -> tuple[np.ndarray, int]:
    """Summed over the grid: where branches let a bundle run, times the iterations of the loops around it.

    `regions` are the other loops: first bundle, the one after the last, and their iterations in each step of the grid.
    """
    assumed = 0
    for i, target, predicate, negated in skips:
        first = i + _DELAY_SLOTS + 1
        if first >= target:
            continue
        taken = scalars.value(predicate) if predicate else True
        if taken is None:
            assumed += 1
            continue
        regions.append((first, target, np.broadcast_to(np.asarray(taken, bool) == negated, scalars.iterations)))
    edges = sorted({0, bundles, *(e for first, last, _ in regions for e in (first, last)), *(steps or ())})
    issued = np.zeros(bundles, dtype=np.int64)
    for a, b in itertools.pairwise(edges):
        inside = steps is not None and steps[0] <= a < steps[1]
        runs = np.ones(scalars.iterations if inside else 1, np.int64)
        for first, last, times in regions:
            if first <= a < last:
                runs = runs * (times if inside else times[:1])
        issued[a:b] = runs.sum()
    return issued, assumed


class _Scalars:
    """The kernel's scalar code, evaluated for all iterations of the loop over the grid at once; None where unknown."""

    def __init__(self, bundles: list[str], grid: tuple[int, ...]) -> None:
        self.grid, self.iterations = grid, 1
        self.definitions: dict[str, tuple[str, str, str]] = {}
        self.known: dict[str, Any] = {}
        stored: dict[str, list[str]] = {}
        for text in bundles:
            for slot in text.split(";;"):
                plain = _COMMENT.sub("", slot)
                if match := _DEFINITION.search(plain):
                    # A predicate before the operands ("(!%p7), 0") says when the slot runs at all.
                    arguments = re.sub(r"^\(!?%\w+\), ", "", match[3].strip().rstrip("}").strip())
                    self.definitions[match[1]] = (match[2], arguments, slot)
                elif match := re.search(r"sst \[smem:\[#(\w+_spill)\]\] %(\w+)", plain):
                    stored.setdefault(match[1], []).append(match[2])
        self.stored = {place: names[0] for place, names in stored.items() if len(names) == 1}

    def trips(self, predicate: str) -> tuple[Any, bool]:
        """Iterations of the loop that the predicate ends, one number or one a step; whether it runs over the grid."""
        name, arguments, _ = self.definitions.get(predicate, ("", "", ""))
        match = re.fullmatch(r"%(\w+), (-?\d+|%\w+)", arguments)
        if not name.startswith("scmp.ge") or match is None:
            return None, False
        limit = self._operand(match[2])
        step = self._source(match[1])
        add = re.fullmatch(r"(\d+), %(\w+)|%(\w+), (\d+)", step[1]) if step[0] == "sadd.s32" else None
        if limit is None or add is None:
            return None, False
        phi = self._source(add[2] or add[3])
        start = self._operand(phi[1].split(",")[0].strip()) if phi[0] == "sphi" else None
        if start is None:
            return None, False
        turns = -(-(np.asarray(limit, np.int64) - start) // int(add[1] or add[4]))
        return np.maximum(turns, 1), "iteration index" in phi[2]  # tested at its end

    def _source(self, name: str) -> tuple[str, str, str]:
        """The definition of a value that was moved, or spilled and loaded again."""
        found = self.definitions.get(name, ("", "", ""))
        for _ in range(len(self.definitions)):
            stored = re.match(r"\[smem:\[#(\w+_spill)\]\]", found[1]) if found[0] == "sld" else None
            if stored and stored[1] in self.stored:
                found = self.definitions.get(self.stored[stored[1]], ("", "", ""))
            elif found[0] == "smov" and found[1].startswith("%") and "," not in found[1]:
                found = self.definitions.get(found[1][1:], ("", "", ""))
            else:
                break
        return found

    def over_grid(self, iterations: int) -> None:
        self.iterations = iterations
        self.known.clear()

    def value(self, name: str) -> Any:
        if name not in self.known:
            self.known[name] = None  # a value that depends on itself is unknown
            self.known[name] = self._evaluate(*self.definitions.get(name, ("", "", "")))
        return self.known[name]

    def _operand(self, text: str) -> Any:
        return self.value(text[1:]) if text.startswith("%") else int(text) if re.fullmatch(r"-?\d+", text) else None

    def _evaluate(self, opcode: str, arguments: str, slot: str) -> Any:
        if opcode == "sphi":
            return self._counter(slot)
        if opcode == "sld":
            match = re.match(r"\[smem:\[#(\w+_spill)\]\]", arguments)
            return self.value(self.stored[match[1]]) if match and match[1] in self.stored else None
        if match := re.fullmatch(r"\((!?)%(\w+), ([%\w-]+)\), ([%\w-]+)", arguments):  # p ? second : first
            condition, a, b = self.value(match[2]), self._operand(match[3]), self._operand(match[4])
            if opcode != "smov" or condition is None or a is None or b is None:
                return None
            return np.where(np.asarray(condition, bool) != bool(match[1]), b, a)
        operands = [self._operand(x.strip()) for x in arguments.split(",")]
        if any(x is None for x in operands) or opcode not in _OPCODES:
            return None
        return _OPCODES[opcode](*operands)

    def _counter(self, slot: str) -> Any:
        match = _INDEX.search(slot)
        if match is None:
            return None
        stage, turn = int(match[1]), np.arange(self.iterations)
        # The loop runs one step ahead of the computation; that step only starts copies.
        if match[2] is None:
            return turn if stage == 0 else None
        at = np.clip(turn - stage, 0, int(np.prod(self.grid, dtype=np.int64)) - 1)
        return np.unravel_index(at, self.grid)[int(match[2])]


_OPCODES: dict[str, Callable[..., Any]] = {
    "smov": lambda a: a,
    "sadd.s32": lambda a, b: _signed(a + b),
    "ssub.s32": lambda a, b: _signed(a - b),
    "smul.u32": lambda a, b: _signed(a * b),
    "sand.u32": lambda a, b: a & b,
    "sshll.u32": lambda a, b: _signed(a << b),
    "sshrl.u32": lambda a, b: _signed((np.asarray(a, np.int64) % 2**32) >> b),
    "scmp.eq.s32.totalorder": lambda a, b: a == b,
    "scmp.ne.s32.totalorder": lambda a, b: a != b,
    "scmp.lt.s32.totalorder": lambda a, b: a < b,
    "scmp.le.s32.totalorder": lambda a, b: a <= b,
    "scmp.gt.s32.totalorder": lambda a, b: a > b,
    "scmp.ge.s32.totalorder": lambda a, b: a >= b,
    "por": lambda a, b: np.asarray(a, bool) | np.asarray(b, bool),
    "pand": lambda a, b: np.asarray(a, bool) & np.asarray(b, bool),
    "pnand": lambda a, b: ~(np.asarray(a, bool) & np.asarray(b, bool)),
    "pnor": lambda a, b: ~(np.asarray(a, bool) | np.asarray(b, bool)),
    "pneg": lambda a: ~np.asarray(a, bool),
}


def _signed(x: Any) -> Any:
    """Scalar registers hold 32 bits; 4294967295 is −1."""
    return (np.asarray(x, np.int64) + 2**31) % 2**32 - 2**31
