"""The resources of a compiled Triton kernel: registers, spills, shared memory, widths of access, matrix instructions.

NVIDIA: `cuobjdump`, which comes with Triton, reads the machine code. AMD: the assembly that Triton keeps.
Output that lacks a figure raises `Unreadable`; a missing figure is never reported as 0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fsam_profiling.gpu.launches import Launch
from fsam_profiling.gpu.llvm import Unreadable


class Card(NamedTuple):
    """A card, for its floor and occupancy.

    NVIDIA, limits of a multiprocessor: those of sm_80 and sm_90 are in the headers of NVIDIA's CCCL; those of sm_100
    and sm_120 are assumed to be what the CUDA programming guide lists and were not checked against it. Registers are
    given to a warp in units of 256, and each block costs 1 KiB of shared memory more. AMD: 512 vector registers a lane
    and SIMD in units of 8, 8 wavefronts a SIMD, 4 SIMDs and 64 KiB of LDS a compute unit; the register rule agrees with
    the occupancy that LLVM prints. Bandwidths are the published figures of the cards named.

    Attributes:
        bandwidth: bytes a second.
        target: what Triton compiles for.
        registers: of a multiprocessor, over all lanes; for AMD of one lane of one SIMD.
        warps: resident on a multiprocessor.
        blocks: resident on a multiprocessor.
        shared: bytes of a multiprocessor.
    """

    name: str
    bandwidth: float
    target: GPUTarget
    registers: int
    warps: int
    blocks: int
    shared: int

    @property
    def warp(self) -> int:
        return self.target.warp_size


CARDS = {
    "sm_80": Card("A100 80GB SXM", 2039e9, GPUTarget("cuda", 80, 32), 65536, 64, 32, 164 * 1024),
    "sm_90": Card("H100 SXM", 3350e9, GPUTarget("cuda", 90, 32), 65536, 64, 32, 228 * 1024),
    "sm_100": Card("B200", 8000e9, GPUTarget("cuda", 100, 32), 65536, 64, 32, 228 * 1024),
    "sm_120": Card("RTX PRO 6000", 1792e9, GPUTarget("cuda", 120, 32), 65536, 48, 24, 100 * 1024),
    "gfx942": Card("MI300X", 5300e9, GPUTarget("hip", "gfx942", 64), 512, 32, 32, 64 * 1024),
}


# Another card of an architecture, by its own name.
BY_NAME = CARDS | {"h200": CARDS["sm_90"]._replace(name="H200 SXM", bandwidth=4800e9)}


class Code(NamedTuple):
    """One kernel's machine code.

    Attributes:
        registers: of a thread.
        spills: instructions that move registers to and from local memory (NVIDIA), or spilled registers (AMD).
        shared: bytes of a program.
        occupancy: resident warps over the maximum, from registers, shared memory and threads.
        widest_load, widest_store: bytes of a thread's widest access to memory.
        matrix: matrix instructions by name.
        llvm: the LLVM code that the machine code was made from.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    widest_load: int
    widest_store: int
    matrix: dict[str, int]
    llvm: str


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile a launch for a card, which need not be present."""
    names, card = launch.fn.arg_names, BY_NAME[arch]
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(names):
        found: list[list[Any]] = [["tt.divisibility", 16]] if name in launch.aligned else []
        if card.target.backend == "hip" and name in launch.within_2_gib:
            found.append(["tt.pointer_range", 32])
        if found:
            attributes[(i,)] = found
    source = ASTSource(
        fn=launch.fn,
        signature={name: launch.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=card.target, options={"num_warps": launch.num_warps, **launch.options})


def read(launch: Launch, arch: str) -> Code:
    """Compile and read.

    Raises:
        Unreadable: where the compiler's output lacks a figure.
    """
    compiled, card = compile_launch(launch, arch), BY_NAME[arch]
    figures = _amd if card.target.backend == "hip" else _nvidia
    registers, spills, loads, stores, matrix = figures(compiled)
    shared = compiled.metadata.shared
    return Code(
        registers,
        spills,
        shared,
        occupancy(card, registers, shared, launch.num_warps),
        max(loads, default=0),
        max(stores, default=0),
        matrix,
        compiled.asm["llir"],
    )


def occupancy(card: Card, registers: int, shared: int, warps: int) -> float:
    """Resident warps of programs of `warps` warps, over the card's most."""
    if card.target.backend == "hip":
        simds = 4
        by_registers = min(card.warps // simds, card.registers // _up(max(registers, 1), 8)) * simds // warps
        by_shared = card.shared // shared if shared else card.blocks
    else:
        by_registers = card.registers // (_up(max(registers, 1) * 32, 256) * warps)
        by_shared = card.shared // _up(shared + 1024, 128)
    return min(by_registers, by_shared, card.blocks, card.warps // warps) * warps / card.warps


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def _nvidia(compiled: Any) -> tuple[int, int, list[int], list[int], dict[str, int]]:
    """(registers, spills, widths of loads, widths of stores, matrix instructions) from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        text = _tool("cuobjdump", "-res-usage", "-sass", str(path))
    registers = re.findall(r"\bREG:(\d+)", text)
    instructions = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    if len(registers) != 1 or not any(name.startswith("EXIT") for name in instructions):
        raise Unreadable(f"cannot read the machine code that Triton {triton.__version__} made: use {KNOWN}")
    widths = {"LDG": [], "STG": []}  # type: dict[str, list[int]]
    for name in instructions:
        if name[:3] in widths:
            bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", name)
            widths[name[:3]].append(int(bits[1]) // 8 if bits else 4)
    spills = sum(name.startswith(("LDL", "STL")) for name in instructions)
    matrix = Counter(name for name in instructions if re.match(r"(H|I|D|Q|O|B)?G?MMA|UTC\w*MMA", name))
    return int(registers[0]), spills, widths["LDG"], widths["STG"], dict(matrix)


def _amd(compiled: Any) -> tuple[int, int, list[int], list[int], dict[str, int]]:
    """The same from the assembly; vector registers and accumulation registers count together."""
    code = compiled.asm["amdgcn"]
    figures = {
        name: re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", code, re.M) for name in (*_AMD_REGISTERS, *_AMD_SPILLS)
    }
    if any(len(found) != 1 for found in figures.values()):
        raise Unreadable(f"cannot read the assembly that Triton {triton.__version__} made: use {KNOWN}")
    value = {name: int(found[0]) for name, found in figures.items()}
    widths = {"load": [], "store": []}  # type: dict[str, list[int]]
    for kind, size in re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", code, re.M):
        words = re.search(r"dwordx?(\d)?", size)
        widths[kind].append(4 * int(words[1] or 1) if words else 1 if "byte" in size else 2)
    matrix = Counter(re.findall(r"^\s*(v_s?mfmac?_\w+)", code, re.M))
    registers = value["vgpr_count"]  # includes the accumulation registers on this architecture
    return registers, sum(value[x] for x in _AMD_SPILLS), widths["load"], widths["store"], dict(matrix)


_AMD_REGISTERS = ("vgpr_count", "agpr_count")
_AMD_SPILLS = ("vgpr_spill_count", "sgpr_spill_count")
KNOWN = "Triton 3.6 to 3.9, whose output this was written for"


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise Unreadable(f"{name} is not where Triton {triton.__version__} should have it ({path}): use {KNOWN}")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr or done.stdout).strip().splitlines()
        raise Unreadable(f"{name} of Triton {triton.__version__} failed: {message[-1] if message else 'no message'}")
    return done.stdout
