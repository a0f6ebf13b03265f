"""`fsam profile parameters`: its implementations agree, and its figures are consistent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fsam_core.errors import UserError
from fsam_kernels import spec
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling.timing import parameter_steps, parameters

SHAPES = [(60, 40), (7,), (40, 120)]
TRACE = 50 * 2**-24


def values(tensors) -> list[np.ndarray]:
    return [x.detach().double().numpy() for x in tensors]


def test_all_implementations_agree():
    steps = parameter_steps.parameter_steps(SHAPES, "cpu")
    assert list(steps) == ["textbook", "foreach", "fsam torch"]
    for _ in range(3):
        for step in steps.values():
            step()
    for name in ("foreach", "fsam torch"):
        for x, y in zip(values(steps[name].params), values(steps["textbook"].params), strict=True):
            assert np.abs(x - y).max() <= TRACE * np.abs(y).max() + 1e-6 * parameter_steps.LR


def test_triton_agrees_with_torch():
    """In its interpreter, on small tensors."""
    make = lambda seed: [0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in SHAPES]
    steps = [parameter_steps.FsamStep(backend, SHAPES, make(1), make(2), "cpu") for backend in ("torch", "triton")]
    for step in steps:
        step()
    for x, y in zip(*(values(step.params) + values(step.moved) for step in steps), strict=True):
        assert np.abs(x - y).max() <= TRACE * np.abs(y).max()


def test_fsam_step_matches_spec_and_keeps_gradients():
    ours = parameter_steps.parameter_steps(SHAPES, "cpu")["fsam torch"]
    states = [ours.optimizer.state[p] for p in ours.params]
    theta, g, second = values(ours.params), values(ours.g), values(ours.second)
    m, v = (values([x[name] for x in states]) for name in ("exp_avg", "exp_avg_sq"))
    ours()
    clip, again = (spec.clip_factor(x, parameter_steps.CLIP) for x in (g, second))
    assert clip == again == 1  # clipping has a test of its own
    adam = {"clip": clip, "b2": parameter_steps.B2, "eps": parameter_steps.EPS, "correction": 1 - parameter_steps.B2**2}
    sumsq, dot = spec.preconditioned_norm(g, v, **adam)
    moved = spec.perturb(theta, g, v, spec.scale(parameter_steps.RHO, sumsq, dot, "l2"), **adam)
    for x, y in zip(values(ours.moved), moved, strict=True):
        assert np.abs(x - y).max() <= TRACE * np.abs(y).max()
    settings = {"lr": parameter_steps.LR, "b1": 0.9, "b2": parameter_steps.B2, "eps": parameter_steps.EPS}
    settings["weight_decay"] = 1e-4
    for i, row in enumerate(zip(theta, second, m, v, strict=True)):
        want = spec.adamw(*row, step=2, clip=again, **settings)[0]
        assert np.abs(values(ours.params)[i] - want).max() <= TRACE * np.abs(want).max()
    for x, y in zip(values(ours.g) + values(ours.second), g + second, strict=True):
        assert np.array_equal(x, y)


def test_every_implementation_clips(monkeypatch):
    monkeypatch.setattr(parameter_steps, "CLIP", 0.01)
    steps = parameter_steps.parameter_steps(SHAPES, "cpu")
    for step in steps.values():
        step()
    for name in ("foreach", "fsam torch"):
        for p, q in zip(steps[name].params, steps["textbook"].params, strict=True):
            x, y = (w.optimizer.state[r]["exp_avg_sq"] for w, r in ((steps[name], p), (steps["textbook"], q)))
            np.testing.assert_allclose(x, y, rtol=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm


def test_rows_are_consistent():
    rows, operations = parameter_steps.measure(SHAPES, "cpu", 3)
    assert [row["variant"] for row in rows] == ["textbook", "foreach", "fsam torch"]
    assert rows[0]["to_textbook"] == rows[1]["to_foreach"] == 1
    assert [row["operation"] for row in operations] == [*parameter_steps.OPERATIONS, *parameter_steps.KEPT]
    elements = sum(int(np.prod(shape)) for shape in SHAPES)
    assert [row["least_bytes"] // elements for row in operations] == [8, 4, 8, 16, 4, 28, 12, 12]
    for row in operations:
        assert row["to_copy_p20"] <= row["to_copy"] <= row["to_copy_p80"]
        assert row["gigabytes_per_second"] == pytest.approx(row["least_bytes"] / row["ms"] / 1e6)


def test_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WEIGHTS, "small", SHAPES)
    path = tmp_path / "parameters.json"
    threads = torch.get_num_threads()
    options = parameters.ParametersOptions(model="small", device="cpu", threads=1, repeats=2, json=path)
    assert parameters.run(options) == 0
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert (found["kind"], found["about"]["parameters"]) == ("parameters", 60 * 40 + 7 + 40 * 120)
    out = capsys.readouterr().out
    for row in found["rows"]:
        assert row.get("variant", row.get("operation")) in out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model": "huge"}, "--model: 'huge' is not known; use 24m"),
        ({"repeats": 0}, "--repeats: at least 1 is needed, got 0"),
        ({"threads": 0}, "--threads: at least 1 is needed, got 0"),
    ],
)
def test_bad_input_is_refused(options, why):
    with pytest.raises(UserError, match=why):
        parameters.run(parameters.ParametersOptions(**options))
