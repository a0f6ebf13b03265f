"""The offline reader of Triton kernels: what it says of every kernel of ours, and of kernels whose figures are known.

Compiling needs a process without Triton's interpreter, which `tests/conftest.py` switches on for all others.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

import torch

from fsam_core import UserError
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.shapes import HEADS, WEIGHTS, Head
from fsam_kernels.triton import tiles
from fsam_profiling import gpu
from fsam_profiling.gpu import code, launches, llvm, parameter_launches, parameters, step
from fsam_profiling.gpu import programs as gpu_programs

KERNELS = Path(__file__).with_name("gpu_kernels.py")
N, BLOCK = 10_000, 1024  # as in gpu_kernels.py
ENOUGH = """
import json, sys
from fsam_profiling.gpu import Gpu, read
jobs = [("all", "gpt2", "bfloat16"), ("gfx942", None, "bfloat16"), ("gfx942", "gpt2", "float32")]
json.dump([row for arch, shape, dtype in jobs for row in read(Gpu(arch, shape=shape, dtype=dtype))], sys.stdout)
"""
ALL = """
import json, sys
from fsam_profiling.gpu import Gpu, read
dtypes = ("bfloat16", "float16", "float32")
json.dump([row for dtype in dtypes for row in read(Gpu("all", dtype=dtype))], sys.stdout)
"""


PARAMETERS = """
import json, sys
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.triton import tables
from fsam_profiling.gpu.parameter_launches import OPERATIONS, launches
from fsam_profiling import gpu_code
from fsam_profiling.gpu.parameters import count, read
few = ("preconditioned_norm", "perturb to bfloat16 at random", "adamw, bfloat16 copy")
rows = list(read(models=["gpt2"], operations=[each for each in OPERATIONS if each.name in few]))
launch = launches(OPERATIONS[0], WEIGHTS["gpt2"])[0]
launch.tables["table_ptr"][:, tables.ALIGNED] = 0
json.dump([rows, count(launch, gpu_code.read(launch, "sm_90").llvm, 32).load_width], sys.stdout)
"""
STEP = """
import json, sys
from fsam_profiling.gpu.step import read
json.dump(list(read(["sm_90"], "24m", "adamw,1/8")), sys.stdout)
"""
ALL_PARAMETERS = """
import json, sys
from fsam_profiling.gpu.parameters import read
json.dump(list(read()), sys.stdout)
"""


def compiled(*command: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_sound(rows: list[dict[str, Any]]) -> None:
    """0 spills, 16 bytes a thread wherever logits move, at most 1.1x the least bytes, no figure missing."""
    for row in rows:
        where = (row["arch"], row["stage"], row["options"], row["shapes"], row["dtype"])
        assert 1 <= row["ratio"] <= 1.1, where
        assert row["floor_us"] > 0, where
        for kernel in row["kernels"]:
            assert kernel["spills"] == 0, where
            assert kernel["registers"] > 0, where
            assert 0.2 < kernel["occupancy"] <= 1, where
            assert kernel["load_bytes"] >= 16, where
            assert kernel["widest_load_bytes"] >= 16, where
            assert 1 <= kernel["ratio"] <= 1.1, where
            if kernel["kernel"] in ("cotangent", "through_cap"):
                assert kernel["store_bytes"] >= 16, where
                assert kernel["widest_store_bytes"] >= 16, where


def test_every_kernel_compiles_for_every_target_and_moves_little_more_than_it_must():
    rows = compiled("-c", ENOUGH)
    assert_sound(rows)
    assert {row["arch"] for row in rows} == set(code.CARDS)
    for arch in code.CARDS:
        assert {k["kernel"] for row in rows for k in row["kernels"] if row["arch"] == arch} == set(launches.KERNELS)
    assert {shape for row in rows for shape in row["shapes"]} == set(HEADS)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_shape_and_dtype():
    rows = compiled("-c", ALL)
    assert_sound(rows)
    assert len({(row["arch"], row["dtype"]) for row in rows}) == 3 * len(code.CARDS)


def assert_parameters_sound(rows: list[dict[str, Any]]) -> None:
    """0 spills, 16 bytes a thread wherever tensors move, at most 1.05x the least bytes, two launches at most."""
    for row in rows:
        where = (row["arch"], row["operation"], row["model"])
        assert 1 <= row["ratio"] <= 1.05, where
        assert row["bytes_per_parameter"] == pytest.approx(row["ratio"] * row["least_bytes"] / row["parameters"])
        assert row["launches"] <= 2, where
        for kernel in row["kernels"]:
            assert kernel["spills"] == 0, where
            assert kernel["occupancy"] >= 0.2, where
        first = row["kernels"][0]
        assert first["load_bytes"] >= 16, where
        assert first["store_bytes"] >= 16 or row["operation"].startswith("preconditioned_norm"), where


def test_the_parameter_kernels_move_little_more_than_they_must_on_every_target():
    rows, of_unaligned = compiled("-c", PARAMETERS)
    assert_parameters_sound(rows)
    assert of_unaligned == 4  # the negative control: the same code, told that nothing is aligned
    assert {row["arch"] for row in rows} == set(code.CARDS)
    assert {(row["tensors"], row["parameters"]) for row in rows} == {(148, 124_439_808)}
    assert {k["kernel"] for row in rows for k in row["kernels"]} == set(parameter_launches.KERNELS)


@pytest.mark.slow
def test_every_parameter_kernel_on_every_target_and_model():
    rows = compiled("-c", ALL_PARAMETERS)
    assert_parameters_sound(rows)
    assert len(rows) == len(code.CARDS) * len(parameter_launches.OPERATIONS) * len(WEIGHTS)


@pytest.mark.parametrize(
    ("shape", "changes", "cotangent"),
    [
        ("24m", {"cotangent": "recompute"}, 2),
        pytest.param("24m", {}, 1, marks=pytest.mark.slow),
        pytest.param("118m", {}, 1, marks=pytest.mark.slow),
        pytest.param("24m", {"cotangent": "keep"}, 1, marks=pytest.mark.slow),
        pytest.param("24m", {"correction_fraction": 0.25}, 1, marks=pytest.mark.slow),
        pytest.param("24m", {"correction_fraction": 0.25, "cotangent": "recompute"}, 1.25, marks=pytest.mark.slow),
        pytest.param("24m", {"correction_fraction": 0.125, "cut": "hidden"}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_calls_each_operation_as_often_as_its_method_needs(shape, changes, cotangent):
    found = step.calls(shape, "precond-functional-sam", changes)
    assert found.head == {"statistics": 1, "cotangent": cotangent}
    once = ("preconditioned_norm", "perturb to bfloat16", "adamw, bfloat16 copy")
    assert found.parameters == dict.fromkeys(once, 1)


def test_a_step_of_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="shape: 'llama3-8b' is not a whole model: use 24m, 118m, 1208m, gpt2"):
        next(step.read(["sm_90"], "llama3-8b", "adamw"))


def test_a_step_with_an_operation_that_is_not_compiled_is_refused():
    with pytest.raises(UserError, match="gpu: preconditioned_norm of float32 is not among the operations"):
        step.calls("24m", "sam", {})


def test_a_step_moves_what_its_operations_move():
    adamw, eighth = compiled("-c", STEP)
    logits, weights = 8192 * 32768, 43_064_640
    # Two bytes to read, two to read and two to write a logit again; 30 bytes a weight. P of an eighth is kept; the norm
    # moves 8 and the perturbation 14 bytes a weight.
    assert adamw["least_bytes"] == pytest.approx(6 * logits + 30 * weights, rel=1e-3)
    assert eighth["least_bytes"] == pytest.approx(6 * logits + (30 + 8 + 14) * weights, rel=1e-3)
    for row in (adamw, eighth):
        assert row["bytes"] == pytest.approx(row["head_bytes"] + row["parameter_bytes"], abs=1)
        assert row["ratio"] == pytest.approx(row["bytes"] / row["least_bytes"])
        assert 1 <= row["ratio"] < 1.02
        assert row["floor_us"] == pytest.approx(row["least_bytes"] / 3350e9 * 1e6)


def test_chunks_are_counted_by_what_is_left_of_their_tensor():
    operation = parameter_launches.OPERATIONS[0]
    chunk, partials = parameter_launches.launches(operation, [(5000,), (2048,), (3,), (904,), ()])
    assert parameters._kinds(chunk) == {1: (6, 1), 3: (4, 1), 904: (2, 2), 2048: (0, 3)}
    assert parameters._kinds(partials) == {0: (0, 1), -1: (1, 1)}


def test_the_parameter_kernels_are_not_compiled_under_the_interpreter():
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        next(parameters.read())


def test_figures_of_kernels_that_are_known():
    found = compiled(str(KERNELS))
    for arch, kernels in found.items():
        whole, programs = N // BLOCK * BLOCK, -(-N // BLOCK)
        assert kernels["copy"]["bytes"] == 8 * whole, arch
        assert kernels["axpy"]["bytes"] == 12 * N, arch  # masked: N ends at a multiple of 32 bytes
        assert kernels["loop"]["bytes"] == 8 * N, arch
        assert kernels["every other"]["bytes"] == 12 * whole, arch
        assert kernels["two passes"]["bytes"] == 12 * whole, arch
        assert kernels["matmul"]["bytes"] == 2 * 4 * 64 * 64, arch
        assert programs > N // BLOCK  # the masked kernel has a ragged program
        for name, widths in {
            "copy": (16, 16),
            "copy of unaligned arrays": (4, 4),
            "every other": (4, 16),
            "axpy": (4, 4),
        }.items():
            assert (kernels[name]["load_width"], kernels[name]["store_width"]) == widths, (arch, name)
            assert (kernels[name]["widest_load"], kernels[name]["widest_store"]) == widths, (arch, name)
        assert "an address, a mask or a branch depends on" in kernels["where a value says"]["unreadable"]
        assert "is not counted" in kernels["atomic"]["unreadable"]
        assert all(kernel["spills"] == 0 for name, kernel in kernels.items() if name != "too few registers")
        assert not kernels["copy"]["matrix"]
        assert kernels["matmul"]["shared"] > 0
    assert any(name.startswith("HGMMA") for name in found["sm_90"]["matmul"]["matrix"])
    assert any(name.startswith("v_mfma") for name in found["gfx942"]["matmul"]["matrix"])
    assert found["sm_90"]["too few registers"]["spills"] > 0
    for name, kernel in found["gfx942"].items():
        if not kernel["shared"]:
            assert kernel["occupancy"] == kernel["compiler's own occupancy"], name


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 8, 1.0),
        ("sm_90", 33, 0, 8, 48 / 64),  # 40 a thread: 6 programs of 8 · 32 · 40 in 65536
        ("sm_90", 255, 0, 8, 8 / 64),
        ("sm_90", 16, 100 * 1024, 4, 8 / 64),
        ("sm_90", 16, 0, 1, 32 / 64),  # 32 programs at most
        ("sm_120", 40, 0, 8, 1.0),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 65, 0, 4, 28 / 32),
        ("gfx942", 512, 0, 4, 4 / 32),
        ("gfx942", 32, 32 * 1024, 8, 16 / 32),
    ],
)
def test_occupancy_is_what_the_published_limits_give(arch, registers, shared, warps, expected):
    assert code.occupancy(code.CARDS[arch], registers, shared, warps) == expected


def test_a_launch_is_recorded_as_it_is_made():
    head, before = Head(100, 8, 50257), tiles.cotangent
    statistics, combine = launches.launches(launches.STAGES[0], head, torch.bfloat16, Loss(label_smoothing=0.1))
    assert (statistics.kernel, combine.kernel) == ("tile_statistics", "combine")
    assert statistics.grid == 100 * 13
    assert statistics.signature["u_ptr"] == "*bf16"
    assert statistics.signature["V"] == "i32"
    assert statistics.constants == {"soft_cap": None, "BLOCK": 4096}
    assert statistics.integers["u_stride"] == 50272
    assert {"u_ptr", "u_stride", "readable"} <= set(statistics.aligned)
    assert "V" not in statistics.aligned
    assert statistics.options == {"enable_fp_fusion": False}
    assert "C" not in combine.constants
    assert statistics.least_bytes == 100 * (50257 * 2 + 8 + 4 + 3 * 4 * 13)
    assert tiles.cotangent is before


@pytest.mark.parametrize("loss", launches.LOSSES.values(), ids=launches.LOSSES)
@pytest.mark.parametrize("stage", launches.STAGES, ids=lambda stage: stage.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_what_is_timed_on_a_card_runs(stage, loss):
    u_CxV, labels_C = launches.chunk(Head(3, 8, 20), torch.bfloat16, "cpu")
    before = u_CxV.clone()
    stage.call(u_CxV, labels_C, loss)()
    assert torch.equal(u_CxV, before) == (stage.name != "cotangent")


def test_the_kernels_are_put_back_after_an_error():
    before = tiles.cotangent
    breaks = launches.Stage("breaks", lambda *of_chunk: lambda: 1 / int(tiles.cotangent is before), lambda *sizes: 0)
    with pytest.raises(ZeroDivisionError):
        launches.launches(breaks, Head(4, 8, 16), torch.bfloat16)
    assert tiles.cotangent is before


def test_rows_of_a_ragged_last_chunk_run_the_same_machine_code():
    full, ragged = (
        launches.launches(launches.STAGES[0], Head(n, 8, 4096), torch.bfloat16, CROSS_ENTROPY)[1] for n in (256, 37)
    )
    assert full.specialisation == ragged.specialisation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (gpu.Gpu(arch="sm_75"), "arch: 'sm_75' is not known: use all, sm_80"),
        (gpu.Gpu(shape="5b"), "shape: '5b' is not known: use tiny"),
        (gpu.Gpu(), "TRITON_INTERPRET is set"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        gpu.run(options)


def test_a_compiler_whose_output_is_not_understood_is_named_with_what_would_work(monkeypatch):
    with pytest.raises(UserError, match=r"cannot read the assembly that Triton .* made: use Triton 3"):
        code._amd(SimpleNamespace(asm={"amdgcn": ".vgpr_count: 8"}))
    monkeypatch.setattr(code, "_tool", lambda *arguments: "Function k: REGISTERS=12")
    with pytest.raises(UserError, match=r"cannot read the machine code that Triton .* made: use Triton 3"):
        code._nvidia(SimpleNamespace(asm={"cubin": b""}))
    with pytest.raises(UserError, match="should define one function, and defines 0"):
        llvm.parse("; nothing")


def test_a_tool_that_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match="nosuchtool is not where Triton"):
        code._tool("nosuchtool")


# Threads below 20 store 4 bytes at x + 4 t, the others 8 bytes at x + 1024 + 8 t; all join again and load one label.
BRANCHES = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2) {
  %4 = tail call i32 @llvm.nvvm.read.ptx.sreg.tid.x(), !dbg !4
  %5 = zext nneg i32 %4 to i64
  %6 = icmp slt i32 %4, %2
  br i1 %6, label %7, label %9

7:                                                ; preds = %3
  %8 = getelementptr [4 x i8], ptr addrspace(1) %0, i64 %5
  store float 1.000000e+00, ptr addrspace(1) %8, align 4
  br label %12

9:                                                ; preds = %3
  %10 = getelementptr i8, ptr addrspace(1) %0, i64 1024
  %11 = getelementptr [8 x i8], ptr addrspace(1) %10, i64 %5
  store <2 x float> zeroinitializer, ptr addrspace(1) %11, align 8
  br label %12

12:                                               ; preds = %7, %9
  %13 = phi i32 [ 3, %7 ], [ 5, %9 ]
  %14 = zext i32 %13 to i64
  %15 = getelementptr [8 x i8], ptr addrspace(1) %1, i64 %14
  %16 = tail call i64 asm sideeffect "mov.u64 $0, 0x0;\\0A\\09ld.global.b64 { $0 }, [ $1 + 8 ];", "=l,l"(ptr addrspace(1) %15)
  ret void
}
"""  # noqa: E501


def accesses(text: str) -> list[gpu_programs.Access]:
    region = gpu_programs.REGION
    kernel = llvm.parse(text)
    return gpu_programs.run(kernel, [region, 2 * region, 20], 0, 32, 32, lambda argument, offsets: None)


def test_threads_that_part_are_counted_apart_and_join_again():
    first, second, third = accesses(BRANCHES)
    region = gpu_programs.REGION
    assert (first.argument, first.store, first.width) == (0, True, 4)
    assert np.array_equal(first.addresses, region + 4 * np.arange(20))
    assert (second.argument, second.store, second.width) == (0, True, 8)
    assert np.array_equal(second.addresses, region + 1024 + 8 * np.arange(20, 32))
    assert (third.argument, third.store, third.width) == (1, False, 8)
    assert np.array_equal(third.addresses, 2 * region + 8 + 8 * np.where(np.arange(32) < 20, 3, 5))


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("%5 = zext nneg i32 %4 to i64", "%5 = fptosi float undef to i64"),
        ("ld.global.b64 { $0 }, [ $1 + 8 ]", "red.global.add.u64 [ $1 + 8 ], 1"),
        ("store float 1.000000e+00, ptr addrspace(1) %8, align 4", "%8b = atomicrmw add ptr addrspace(1) %8, i32 1"),
        ("@llvm.nvvm.read.ptx.sreg.tid.x", "@llvm.nvvm.read.ptx.sreg.unheard.of"),
        ("store float 1.000000e+00, ptr addrspace(1) %8", "call void @llvm.memcpy.p1.p1.i64(ptr addrspace(1) %8)"),
    ],
)
def test_text_that_is_not_understood_is_never_a_number(line, instead):
    assert line in BRANCHES
    with pytest.raises(llvm.Unreadable, match="not counted"):
        accesses(BRANCHES.replace(line, instead))
