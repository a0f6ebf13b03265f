"""Kernels with known bytes, widths and faults, compiled and read in a process without the interpreter.

`python gpu_kernels.py` prints the figures of each on sm_90 and gfx942 as JSON, for test_gpu.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
import triton.language as tl

from fsam_kernels.options import CROSS_ENTROPY
from fsam_profiling.gpu import code, traffic
from fsam_profiling.gpu.launches import Launch
from fsam_profiling.gpu.llvm import Unreadable

N, BLOCK = 10_000, 1024


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def axpy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2.0 * tl.load(x_ptr + at, mask=at < n) + tl.load(y_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def every_other(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + 2 * at))


@triton.jit
def two_passes(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(x_ptr + at + BLOCK))


@triton.jit
def loop(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def where_a_value_says(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x, mask=x > 0)


@triton.jit
def atomic(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def sort(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at)))


@triton.jit
def matmul(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(y_ptr + at, tl.dot(x, x))


def launch(fn: Any, grid: int, aligned: bool = True, block: int = BLOCK, warps: int = 4, **options: Any) -> Launch:
    pointers = ("x_ptr", "y_ptr")
    return Launch(
        kernel=fn.__name__,
        fn=fn,
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"},
        constants={"BLOCK": block},
        aligned=pointers if aligned else (),
        within_2_gib=pointers,
        integers={"n": N, "BLOCK": block},
        num_warps=warps,
        options={"enable_fp_fusion": False, **options},
        grid=grid,
        rows=1,
        columns=N,
        loss=CROSS_ENTROPY,
        least_bytes=8 * N,
        bulk=pointers,
    )


def cases(arch: str) -> dict[str, Launch]:
    found = {
        "copy": launch(copy, N // BLOCK),
        "copy of unaligned arrays": launch(copy, N // BLOCK, aligned=False),
        "axpy": launch(axpy, -(-N // BLOCK)),
        "every other": launch(every_other, N // BLOCK),
        "two passes": launch(two_passes, N // BLOCK),
        "loop": launch(loop, 1),
        "where a value says": launch(where_a_value_says, N // BLOCK),
        "atomic": launch(atomic, N // BLOCK),
        "matmul": launch(matmul, 1, block=64),
    }
    if arch != "gfx942":
        found["too few registers"] = launch(sort, 1, block=1024, warps=1, maxnreg=32)
    return found


def read(arch: str, case: Launch) -> dict[str, Any]:
    one = code.read(case, arch)
    found = {**one._asdict(), "llvm": None}
    if arch == "gfx942":
        text = code.compile_launch(case, arch).asm["amdgcn"]
        found["compiler's own occupancy"] = int(re.findall(r"; Occupancy: (\d+)", text)[0]) / 8
    try:
        found.update(traffic.count(case, one.llvm, code.CARDS[arch].warp)._asdict())
    except Unreadable as error:
        found["unreadable"] = str(error)
    return found


if __name__ == "__main__":
    archs = ("sm_90", "gfx942")
    print(json.dumps({arch: {name: read(arch, case) for name, case in cases(arch).items()} for arch in archs}))
