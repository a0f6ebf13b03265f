"""The parameter operations as the TPU's compiler makes them: least bytes, nothing but the bus to wait for."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax.numpy as jnp
import numpy as np
import parameter_trial
import pytest

from fsam_core.errors import UserError
from fsam_kernels import spec, xla
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling.tpu import Chip, Compiled, parameters
from fsam_profiling.tpu.loops import Loop

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SHAPES = [(2048, 640), (640,), (640, 1920), (640,)]


def program(loops: tuple[Loop, ...], xla_cycles: int, xla_bytes: int) -> Compiled:
    chip = Chip("v5e", bytes_per_second=8 * 1.5e9, flops_per_second=4 * 2 * 128**2 * 1.5e9, mxus=4, vmem_bytes=0)
    given = dict.fromkeys((field.name for field in dataclasses.fields(Compiled)), 0)
    given |= {"chip": chip, "kernels": (), "loops": loops, "xla_cycles": xla_cycles, "xla_bytes": xla_bytes}
    return Compiled(**given)


def test_a_loop_takes_its_bundles_or_its_bytes_and_a_program_no_less_than_all_bytes():
    busy = Loop("a", "norm", (4,), issued=100, estimate=300, bytes=50 * 8, bytes_cycles=50)
    waiting = Loop("b", "update", (4,), issued=10, estimate=70, bytes=60 * 8, bytes_cycles=60)
    assert (busy.cycles, waiting.cycles) == (100, 60)
    assert dataclasses.replace(busy, issued=None).cycles == 300
    assert program((), 0, 0).chip.bytes_per_cycle == 8
    assert program((busy, waiting), 300 + 70 + 5, 110 * 8).scheduled_cycles == 100 + 60 + 5
    assert program((busy, waiting), 300 + 70 + 5, 1000 * 8).scheduled_cycles == 1000
    seen = dataclasses.replace(program((busy, waiting), 375, 0), regions={"norm": 305, "update": 70})
    assert seen.scheduled_regions == {"norm": 105, "update": 60}


def test_an_unknown_model_is_refused():
    with pytest.raises(UserError, match="--model: 'huge' is not known; use 24m"):
        parameters.run("v5e", "huge", None)


@needs_compiler
def test_adamw_reads_and_writes_each_array_once_and_in_place():
    found = parameters.read("v5e", "adamw", SHAPES)
    assert found["parameters"] == 2048 * 640 + 640 * 1920 + 2 * 640
    assert found["ratio"] == pytest.approx(1, abs=0.01)
    assert found["loops"] == len(SHAPES)
    assert 0 < found["bundles"] < found["floor_cycles"] <= found["scheduled_cycles"] <= found["estimated_cycles"]
    assert found["temporary_bytes"] == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model", ["24m", "118m"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("operation", parameters.OPERATIONS)
def test_every_operation_moves_the_least_bytes_and_is_bound_by_them(operation, chip, model):
    found = parameters.read(chip, operation, WEIGHTS[model])
    assert found["ratio"] <= 1.05
    assert found["scheduled_ratio"] <= 1.05
    assert found["temporary_bytes"] < 0.1 * 4 * found["parameters"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model", ["24m", "118m"])
def test_the_kernels_that_were_tried_gain_nothing(model):
    for ours, trial in zip(*[iter(parameter_trial.compare("v5e", WEIGHTS[model]))] * 2, strict=True):
        assert trial["kernels"] > 0
        assert trial["scheduled_cycles"] >= 0.99 * ours["scheduled_cycles"]


@pytest.mark.slow
def test_the_kernels_that_were_tried_compute_the_same(monkeypatch):
    monkeypatch.setattr(parameter_trial, "BLOCK_BYTES", 2**16)
    random = np.random.default_rng(0)
    shapes = [(300, 130), (7,), (1000, 576), (8, 8), (513,)]
    theta, g, m, v = ([random.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(4))
    v = [x * x for x in v]
    sums = parameter_trial.norm(
        *([jnp.asarray(x) for x in xs] for xs in (g, v)), clip=0.5, adam=xla.Adam(0.95, 1e-8, 0.3), interpret=True
    )
    want = spec.preconditioned_norm(g, v, clip=0.5, b2=0.95, eps=1e-8, correction=0.3)
    np.testing.assert_allclose([float(x) for x in sums], want, rtol=1e-5)
    lists = [[jnp.asarray(x) for x in xs] for xs in (theta, g, m, v)]
    new = parameter_trial.adamw(*lists, step=3, lr=0.01, clip=0.5, interpret=True)
    for i, row in enumerate(zip(theta, g, m, v, strict=True)):
        oracle = spec.adamw(*row, step=3, lr=0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4, clip=0.5)
        for x, o in zip(new[:3], oracle, strict=True):
            assert np.abs(x[i] - o).max() <= 40 * 2**-24 * np.abs(o).max()
