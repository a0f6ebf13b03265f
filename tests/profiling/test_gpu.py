"""The offline reader of Triton kernels, on every kernel of ours and on kernels with known figures.

Compiling needs a process without Triton's interpreter, which `tests/conftest.py` switches on for all others.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import spawn
from compilers import needs_triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

import torch

from fsam_core import UserError
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.shapes import HEADS, WEIGHTS, Head
from fsam_kernels.triton import tiles
from fsam_profiling.gpu import cli, code, launches, llvm, parameter_launches, parameters, programs, step

KERNELS = Path(__file__).with_name("gpu_kernels.py")
N, BLOCK = 10_000, 1024  # as in gpu_kernels.py
ENOUGH = """
import json, sys
from fsam_profiling.gpu.code import CARDS
from fsam_profiling.gpu.kernels import read
jobs = [(list(CARDS), "gpt2", "bfloat16"), (["gfx942"], None, "bfloat16"), (["gfx942"], "gpt2", "float32")]
json.dump([row for archs, shape, dtype in jobs for row in read(archs, shape, dtype)], sys.stdout)
"""
ALL = """
import json, sys
from fsam_profiling.gpu.code import CARDS
from fsam_profiling.gpu.kernels import read
dtypes = ("bfloat16", "float16", "float32")
json.dump([row for dtype in dtypes for row in read(list(CARDS), dtype=dtype)], sys.stdout)
"""


PARAMETERS = """
import json, sys
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.triton import tables
from fsam_profiling.gpu.parameter_launches import OPERATIONS, launches
from fsam_profiling.gpu import code
from fsam_profiling.gpu.parameters import count, read
few = ("preconditioned_norm", "perturb to bfloat16 at random", "adamw, bfloat16 copy", "lerp")
rows = list(read(models=["gpt2"], operations=[each for each in OPERATIONS if each.name in few]))
launch = launches(OPERATIONS[0], WEIGHTS["gpt2"])[0]
launch.tables["table_ptr"][:, tables.ALIGNED] = 0
json.dump([rows, count(launch, code.read(launch, "sm_90").llvm, 32).load_width], sys.stdout)
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


def compiled(*command: object) -> Any:
    return json.loads(spawn.run(*command, env={"TRITON_INTERPRET": None}, timeout=1800).stdout)


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


@needs_triton
def test_head_kernels_are_sound_on_every_target():
    rows = compiled("-c", ENOUGH)
    assert_sound(rows)
    assert {row["arch"] for row in rows} == set(code.CARDS)
    for arch in code.CARDS:
        assert {k["kernel"] for row in rows for k in row["kernels"] if row["arch"] == arch} == set(launches.KERNELS)
    assert {shape for row in rows for shape in row["shapes"]} == set(HEADS)


@pytest.mark.slow
@needs_triton
def test_head_kernels_are_sound_in_every_shape_and_dtype():
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


@needs_triton
def test_parameter_kernels_are_sound_on_every_target():
    rows, of_unaligned = compiled("-c", PARAMETERS)
    assert_parameters_sound(rows)
    assert of_unaligned == 4  # the negative control: the same code, told that nothing is aligned
    assert {row["arch"] for row in rows} == set(code.CARDS)
    assert {(row["tensors"], row["parameters"]) for row in rows} == {(148, 124_439_808)}
    assert {k["kernel"] for row in rows for k in row["kernels"]} == set(parameter_launches.KERNELS)


@pytest.mark.slow
@needs_triton
def test_parameter_kernels_are_sound_for_every_model():
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
def test_step_calls_each_operation_as_often_as_needed(shape, changes, cotangent):
    found = step.calls(shape, "precond-functional-sam", changes)
    assert found.head == {"statistics": 1, "cotangent": cotangent}
    once = ("preconditioned_norm", "perturb to bfloat16", "adamw, bfloat16 copy")
    assert found.parameters == dict.fromkeys(once, 1)


def test_step_of_a_head_without_model_is_refused():
    with pytest.raises(UserError, match="shape: 'llama3-8b' is not a whole model: use 24m, 118m, 1208m, gpt2"):
        next(step.read(["sm_90"], "llama3-8b", "adamw"))


def test_step_with_an_unlisted_operation_is_refused():
    with pytest.raises(UserError, match="gpu: preconditioned_norm of float32 is not among the operations"):
        step.calls("24m", "sam", {})


@needs_triton
def test_step_bytes_are_the_sum_of_its_operations():
    adamw, eighth = compiled("-c", STEP)
    logits, weights = 8192 * 32768, 43_064_640
    # Two bytes to read, two to read and two to write a logit again; 30 bytes a weight. P of an eighth is kept; the norm
    # moves 8 and the perturbation 14 bytes a weight.
    assert adamw["least_bytes"] == pytest.approx(6 * logits + 30 * weights, rel=1e-3)
    assert eighth["least_bytes"] == pytest.approx(6 * logits + (30 + 8 + 14) * weights, rel=1e-3)
    for row in (adamw, eighth):
        of_kernels = row["head_bytes"] + row["parameter_bytes"]
        assert row["bytes"] == pytest.approx(of_kernels + row["glue_bytes"] + row["weight_pass_bytes"], abs=1)
        assert row["ratio"] == pytest.approx(of_kernels / row["least_bytes"])
        assert 1 <= row["ratio"] < 1.02
        assert row["floor_us"] == pytest.approx(row["least_bytes"] / 3350e9 * 1e6)


def test_chunks_are_grouped_by_their_remaining_elements():
    operation = parameter_launches.OPERATIONS[0]
    chunk, partials = parameter_launches.launches(operation, [(5000,), (2048,), (3,), (904,), ()])
    assert parameters._kinds(chunk) == {1: (6, 1), 3: (4, 1), 904: (2, 2), 2048: (0, 3)}
    assert parameters._kinds(partials) == {0: (0, 1), -1: (1, 1)}


def test_interpreter_is_refused_for_parameter_kernels():
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        next(parameters.read())


@needs_triton
def test_known_kernels_have_their_known_figures():
    found = compiled(KERNELS)
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
def test_occupancy_follows_from_published_limits(arch, registers, shared, warps, expected):
    assert code.occupancy(code.CARDS[arch], registers, shared, warps) == expected


def test_recorded_launch_is_what_would_be_launched():
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
def test_timed_calls_run(stage, loss):
    u_CxV, labels_C = launches.chunk(Head(3, 8, 20), torch.bfloat16, "cpu")
    before = u_CxV.clone()
    stage.call(u_CxV, labels_C, loss)()
    assert torch.equal(u_CxV, before) == (stage.name != "cotangent")


def test_kernels_are_restored_after_an_error():
    before = tiles.cotangent
    breaks = launches.Stage("breaks", lambda *of_chunk: lambda: 1 / int(tiles.cotangent is before), lambda *sizes: 0)
    with pytest.raises(ZeroDivisionError):
        launches.launches(breaks, Head(4, 8, 16), torch.bfloat16)
    assert tiles.cotangent is before


def test_ragged_chunk_shares_the_machine_code():
    full, ragged = (
        launches.launches(launches.STAGES[0], Head(n, 8, 4096), torch.bfloat16, CROSS_ENTROPY)[1] for n in (256, 37)
    )
    assert full.specialisation == ragged.specialisation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (cli.GpuOptions(arch="sm_75"), "arch: 'sm_75' is not known: use all, sm_80.*, h200"),
        (cli.GpuOptions(what="passes", shape="5b"), "shape: '5b' is not known: use tiny"),
        (cli.GpuOptions(shape="5b"), "shape: '5b' is not known: use tiny"),
        (cli.GpuOptions(), "TRITON_INTERPRET is set"),
    ],
)
def test_bad_gpu_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        cli.run(options)


def test_unreadable_compiler_output_names_known_versions(monkeypatch):
    with pytest.raises(UserError, match=r"cannot read the assembly that Triton .* made: use Triton 3"):
        code._amd(SimpleNamespace(asm={"amdgcn": ".vgpr_count: 8"}))
    monkeypatch.setattr(code, "_tool", lambda *arguments: "Function k: REGISTERS=12")
    with pytest.raises(UserError, match=r"cannot read the machine code that Triton .* made: use Triton 3"):
        code._nvidia(SimpleNamespace(asm={"cubin": b""}))
    with pytest.raises(UserError, match="should define one function, and defines 0"):
        llvm.parse("; nothing")


def test_missing_tool_is_named(monkeypatch):
    with pytest.raises(UserError, match="nosuchtool is not where Triton"):
        code._tool("nosuchtool")


# Threads below 20 store 4 bytes at x + 4 t, the others 8 bytes at x + 1024 + 8 t; all rejoin and load one label.
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


def accesses(text: str) -> list[programs.Access]:
    region = programs.REGION
    kernel = llvm.parse(text)
    return programs.run(kernel, [region, 2 * region, 20], 0, 32, 32, lambda argument, offsets: None)


def test_divergent_threads_are_counted_apart_and_rejoin():
    first, second, third = accesses(BRANCHES)
    region = programs.REGION
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
def test_unknown_llvm_text_is_an_error(line, instead):
    assert line in BRANCHES
    with pytest.raises(llvm.Unreadable, match="not counted"):
        accesses(BRANCHES.replace(line, instead))
