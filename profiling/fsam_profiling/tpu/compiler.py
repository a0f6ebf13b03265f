"""A JAX function compiled for a TPU, on a machine without one.

`compile_for` compiles ahead of time for v4, v5e, v5p, v6e or tpu7x with libtpu's own compiler. The figures come from:

* memory (arguments, outputs, temporaries in HBM) and FLOPs: the compiler's analysis of the program;
* cycles of XLA's instructions: the compiler's cost model (`hlo`);
* cycles of a Pallas kernel: the larger of its schedule (`schedules`) and the transfer of its blocks at the published
  bandwidth. Copies that do not overlap with the schedule are not seen.

None of them is measured on a running chip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fsam_core.backends import installed
from fsam_core.errors import UserError
from fsam_profiling.regions import in_order
from fsam_profiling.tpu import hlo, schedules
from fsam_profiling.tpu.loops import Loop, read_loops

# name -> (topology that libtpu knows, cores that share a program). The clock follows from the published peak and the
# multiply-adds a matrix unit does in a cycle: see `Chip`.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2x1", "tpu7x": "tpu7x:2x2x1"}
# The compiler spends a fifth of its time in glibc's malloc, much of it joining freed chunks that it requests again.
# With large caches and no joining a 24m step on v6e compiles in 185 s instead of 207, to the same program. The dumps
# take 84 of the 185; no flag was found that omits some of them and saves time.
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "mxfast": 0,
        "tcache_count": 65535,
        "tcache_max": 8192,
        "trim_threshold": 2**32,
        "mmap_threshold": 2**30,
        "top_pad": 2**26,
    }.items()
)
# Rows of 16 bf16 (128 or 256 columns) that one matrix unit takes a cycle: 128×128 units one row, 256×256 units two.
_ROWS_A_CYCLE = {128: 1, 256: 2}
_MXU_SIZE = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}


@dataclass(frozen=True)
class Chip:
    """One core of a chip, by the compiler's own figures for it."""

    name: str
    bytes_per_second: float
    flops_per_second: float
    mxus: int
    vmem_bytes: int

    @property
    def row_cycles(self) -> float:
        """Cycles of a matrix unit for one row of bf16."""
        return 1 / _ROWS_A_CYCLE[_MXU_SIZE[self.name]]

    @property
    def flops_per_cycle(self) -> float:
        """All matrix units together, in bf16."""
        return self.mxus * 2 * _MXU_SIZE[self.name] ** 2 / self.row_cycles

    @property
    def hertz(self) -> float:
        return self.flops_per_second / self.flops_per_cycle

    @property
    def bytes_per_cycle(self) -> float:
        return self.bytes_per_second / self.hertz


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel in a compiled program; `cycles` are of one run, and it runs `times`.

    `inserted`: the compiler put it there by itself.
    """

    name: str
    grid: tuple[int, ...]
    times: int
    excluded: bool
    region: str
    inserted: bool
    schedule: schedules.Schedule
    bytes: int | None
    bytes_cycles: int | None

    @property
    def cycles(self) -> int:
        return max(self.schedule.cycles, self.bytes_cycles or 0)


@dataclass(frozen=True)
class Compiled:
    """A function compiled for a chip.

    Attributes:
        argument_bytes, output_bytes, temporary_bytes, aliased_bytes: in HBM; an output in the place of a donated
            argument is counted in both and in aliased_bytes.
        flops, bytes_accessed: the compiler's cost analysis, in which the body of a loop counts once and a Pallas kernel
            not at all; None where it has none.
        product_flops: of the matrix products in the traced function, loops and kernels counted (`flops.of_trace`).
        xla_cycles: estimate for the XLA instructions, loops counted once an iteration.
        xla_bytes: bytes the XLA instructions move between HBM and the core, loops likewise.
        excluded_cycles: of conditional branches (`regions.CONDITIONAL`), as if they ran; in no other figure.
        unknown: XLA instructions without an estimate, which count as 0, as "name (bytes)".
        kernels: the Pallas kernels; empty unless requested.
        regions: cycles by region of a step (`fsam_core.regions`), in the order they run; they sum to `cycles`.
        loops: XLA's own fused loops with their schedules; empty unless requested.
    """

    chip: Chip
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    flops: float | None
    bytes_accessed: float | None
    product_flops: int
    xla_cycles: int
    xla_bytes: int
    excluded_cycles: int
    unknown: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    regions: dict[str, int]
    text: str
    loops: tuple[Loop, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes between HBM and the core, of XLA's instructions and of the kernels whose blocks are known."""
        return self.xla_bytes + sum((x.bytes or 0) * x.times for x in self.kernels if not x.excluded)

    @property
    def peak_bytes(self) -> int:
        """HBM for arguments, results that are in no argument's place, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

    @property
    def cycles(self) -> int:
        """XLA's estimate and the kernels' cycles together."""
        return self.xla_cycles + sum(x.cycles * x.times for x in self.kernels if not x.excluded)

    @property
    def scheduled_cycles(self) -> int:
        """`cycles` with XLA's loops judged as kernels are (`loops`), and no less than all bytes over the bandwidth.

        Needs `loops`.
        """
        rest = self.cycles - sum(x.estimate for x in self.loops)
        return max(rest + sum(x.cycles for x in self.loops), round(self.bytes / self.chip.bytes_per_cycle))

    @property
    def scheduled_regions(self) -> dict[str, int]:
        """`regions` with XLA's loops judged as kernels are. Needs `loops`."""
        found = dict(self.regions)
        for x in self.loops:
            found[x.region] += x.cycles - x.estimate
        return found

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.hertz


def compile_for(
    chip: str,
    function: str,
    *,
    options: dict[str, Any] | None = None,
    donate: Sequence[int] = (),
    kernels: bool | Literal["if any"] = True,
    loops: bool = False,
) -> Compiled:
    """Compile a JAX function for one core of `chip`, in a process of its own.

    Args:
        chip: v4, v5e, v5p, v6e or tpu7x.
        function: "module:name", which is called with `options` and returns (function, tuple of arguments), each
            argument a tree of `jax.ShapeDtypeStruct`.
        options: keyword arguments; what JSON can hold.
        donate: positions of donated arguments.
        kernels: read the schedules of Pallas kernels too, which takes half as long again. False refuses a function that
            calls a kernel, because its cycles would be missing from the sum. "if any" compiles a second time where
            there are some, which is faster where there are none. (Tried without gain: kernels compiled in a program
            of their own, 26 s instead of 33 for a small step. What XLA moves to VMEM beforehand or fuses into a
            kernel is then missing, and schedules differ by up to 30 %.)
        loops: read the schedules of XLA's own loops too, outside any `while`; needs `kernels`.

    Raises:
        UserError: for an unknown chip, a libtpu that is missing or whose dumps are unreadable, and where the compiler
            refuses the function (its last lines are quoted).
    """
    if chip not in TOPOLOGIES:
        raise UserError(f"--chip: {chip!r} is not known; use {', '.join(TOPOLOGIES)}")
    schedules.check_version(_libtpu())
    request = {
        "topology": TOPOLOGIES[chip],
        "function": function,
        "options": options or {},
        "donate": list(donate),
    }
    with tempfile.TemporaryDirectory(prefix="fsam-tpu-") as name:
        dumps = Path(name, "dumps")
        dumps.mkdir()
        compile_it = partial(ask, chip, "fsam_profiling.tpu.compiler_child", request, function)
        answer = compile_it(dumps if kernels is True else None)
        program = hlo.read(answer["text"])
        if program.kernels and not kernels:
            raise UserError(f"tpu: {function} calls Pallas kernels; compile it with kernels=True to count them")
        if program.kernels and kernels == "if any":
            answer = compile_it(dumps)
        device = Chip(chip, **answer["chip"])
        found = tuple(_kernel(device, x, program.kernels, answer["calls"], dumps) for x in program.kernels)
        own = read_loops(answer["text"], dumps, device.bytes_per_cycle) if loops else ()
    return Compiled(
        chip=device,
        **{name: answer[name] for name in ("argument_bytes", "output_bytes", "temporary_bytes", "aliased_bytes")},
        flops=answer["flops"],
        bytes_accessed=answer["bytes"],
        product_flops=answer["product_flops"],
        xla_cycles=program.cycles,
        xla_bytes=program.bytes,
        excluded_cycles=program.excluded_cycles + sum(x.cycles * x.times for x in found if x.excluded),
        unknown=tuple(f"{x.name} ({x.bytes * x.times:,} B)" for x in program.unknown if not x.excluded),
        kernels=found,
        regions=_regions(program, found),
        text=answer["text"],
        loops=own,
    )


def to_json(compiled: Compiled) -> dict[str, Any]:
    """Every figure of a compiled function as JSON holds it, without the text of the program."""
    figures = asdict(compiled) | {
        name: getattr(compiled, name) for name in ("cycles", "seconds", "bytes", "peak_bytes")
    }
    del figures["text"], figures["loops"]
    if compiled.loops:
        figures |= {name: getattr(compiled, name) for name in ("scheduled_cycles", "scheduled_regions")}
    figures["chip"] |= {"hertz": compiled.chip.hertz}
    for one, kernel in zip(figures["kernels"], compiled.kernels, strict=True):
        one["cycles"] = kernel.cycles
    return figures


def _libtpu() -> str | None:
    return installed("libtpu")


def ask(chip: str, child: str, request: dict[str, Any], what: str, dumps: Path | None = None) -> dict[str, Any]:
    """The answer of `python -m CHILD REQUEST.json ANSWER.json`, which loads libtpu and writes dumps on request.

    Raises:
        UserError: where the compiler refuses `what`; its last lines are quoted.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "FSAM_PALLAS_INTERPRET": "0",
        "LIBTPU_INIT_ARGS": schedules.FLAGS.format(folder=dumps) if dumps else "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.setdefault("GLIBC_TUNABLES", MALLOC)
    environment.pop("JAX_ENABLE_X64", None)
    with tempfile.TemporaryDirectory(prefix="fsam-tpu-") as folder:
        question, reply = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(request))
        command = [sys.executable, "-m", child, str(question), str(reply)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not reply.exists():
            said = " ".join(line.strip() for line in done.stderr.strip().splitlines()[-3:])[-800:]
            raise UserError(f"tpu: the compiler for {chip} refused {what}: {said or f'exit {done.returncode}'}")
        return json.loads(reply.read_text())


def _kernel(
    chip: Chip, kernel: hlo.Kernel, others: list[hlo.Kernel], calls: list[dict[str, Any]], dumps: Path
) -> Kernel:
    """The schedule of one kernel, and the bytes that its blocks move for the arrays in HBM."""
    shapes = [*kernel.operands, *kernel.results]
    match = next((x for x in calls if x["shapes"] == shapes), None)
    if kernel.inserted is not None:
        match = kernel.inserted._asdict()
    if match is None:
        raise UserError(
            f"tpu: no pallas_call of the traced function has the shapes of kernel {kernel.name}: {', '.join(shapes)}"
        )
    # The compiler compiles and dumps the first of several calls of one kernel.
    base = lambda x: x.name.partition(".")[0]
    same = [x.name for x in others if base(x) == base(kernel) and [*x.operands, *x.results] == shapes]
    name = next((x for x in same if schedules.has(dumps, x)), kernel.name)
    grid = tuple(match["grid"])
    schedule = schedules.read(dumps, name, grid, chip.mxus, chip.row_cycles)
    moved = [x for x, in_hbm in zip(match["moved"], kernel.in_hbm, strict=True) if in_hbm]
    total = None if None in moved else sum(moved)
    cycles = None if total is None else round(total / chip.bytes_per_cycle)
    inserted = kernel.inserted is not None
    return Kernel(kernel.name, grid, kernel.times, kernel.excluded, kernel.region, inserted, schedule, total, cycles)


def _regions(program: hlo.Program, kernels: tuple[Kernel, ...]) -> dict[str, int]:
    """Cycles by region."""
    found: dict[str, float] = {}
    for region, cycles, excluded in [
        *((x.region, x.total, x.excluded) for x in program.counted),
        *((x.region, x.cycles * x.times, x.excluded) for x in kernels),
    ]:
        found[region] = found.get(region, 0) + (0 if excluded else cycles)
    return {name: int(cycles) for name, cycles in in_order(found).items()}
