"""The parameter operations by the TPU compiler: they move the least bytes and are bound by them."""

from __future__ import annotations

import dataclasses

import pytest
from compilers import needs_libtpu

from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling.tpu import parameters
from fsam_profiling.tpu.compiler import Chip, Compiled
from fsam_profiling.tpu.loops import Loop

SHAPES = [(2048, 640), (640,), (640, 1920), (640,)]


def program(loops: tuple[Loop, ...], xla_cycles: int, xla_bytes: int) -> Compiled:
    chip = Chip("v5e", bytes_per_second=8 * 1.5e9, flops_per_second=4 * 2 * 128**2 * 1.5e9, mxus=4, vmem_bytes=0)
    given = dict.fromkeys((field.name for field in dataclasses.fields(Compiled)), 0)
    given |= {"chip": chip, "kernels": (), "loops": loops, "xla_cycles": xla_cycles, "xla_bytes": xla_bytes}
    return Compiled(**given)


def test_scheduled_cycles_are_bundles_or_bytes():
    busy = Loop("a", "norm", issued=100, estimate=300, bytes=50 * 8, bytes_cycles=50)
    waiting = Loop("b", "update", issued=10, estimate=70, bytes=60 * 8, bytes_cycles=60)
    assert (busy.cycles, waiting.cycles) == (100, 60)
    assert dataclasses.replace(busy, issued=None).cycles == 300
    assert program((), 0, 0).chip.bytes_per_cycle == 8
    assert program((busy, waiting), 300 + 70 + 5, 110 * 8).scheduled_cycles == 100 + 60 + 5
    assert program((busy, waiting), 300 + 70 + 5, 1000 * 8).scheduled_cycles == 1000
    seen = dataclasses.replace(program((busy, waiting), 375, 0), regions={"norm": 305, "update": 70})
    assert seen.scheduled_regions == {"norm": 105, "update": 60}


def test_unknown_model_is_refused():
    with pytest.raises(UserError, match="--model: 'huge' is not known; use 24m"):
        parameters.run("v5e", "huge", None)


@needs_libtpu
def test_adamw_moves_each_array_once_and_in_place():
    found = parameters.read("v5e", "adamw", SHAPES)
    assert found["parameters"] == 2048 * 640 + 640 * 1920 + 2 * 640
    assert found["ratio"] == pytest.approx(1, abs=0.01)
    assert found["loops"] == len(SHAPES)
    assert 0 < found["bundles"] < found["floor_cycles"] <= found["scheduled_cycles"] <= found["estimated_cycles"]
    assert found["temporary_bytes"] == 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", ["24m", "118m"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("operation", parameters.OPERATIONS)
def test_every_operation_is_bound_by_its_least_bytes(operation, chip, model):
    found = parameters.read(chip, operation, WEIGHTS[model])
    assert found["ratio"] <= 1.05
    assert found["scheduled_ratio"] <= 1.05
    assert found["temporary_bytes"] < 0.1 * 4 * found["parameters"]
