"""Kernels that a step launches on a GPU, counted on tensors without storage."""

from __future__ import annotations

import importlib.util
import json

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

import torch

from fsam_profiling.gpu import cli
from fsam_profiling.gpu.step_launches import LaunchCounter, counted, parts

EIGHTH = {"correction_fraction": 0.125}
METHOD = "precond-functional-sam"


def meta(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.empty(shape, device="meta") for shape in shapes]


def test_a_list_is_cut_by_tensors_and_by_blocks():
    small = meta(*[(3,)] * 111)
    assert parts([small]) == 2  # 110 tensors a launch
    assert parts([small, small]) == 2  # 64 of pairs
    assert parts([meta((320 * 65536,))]) == 1
    assert parts([meta((320 * 65536 + 1,))]) == 2
    assert parts([meta((0,), (0,))]) == 0
    assert parts([meta((3,), (4,)), meta((), ())]) == 2  # other shapes: tensor by tensor


def test_what_launches_is_counted():
    x, y = meta((10, 6), (10, 6))
    on_host = torch.ones(10, 6)
    with LaunchCounter() as counter:
        _ = x + y
        _ = x.T[2:], torch.empty_like(x), x.view(-1)
        _ = on_host + on_host
        _ = on_host.to("meta")
        torch._foreach_add_([x, y], [y, x])
        with counter.in_trunk():
            _ = x @ y.T
    assert counter.launches == {"add": 1, "_to_copy": 1, "_foreach_add_": 1}
    assert counter.trunk == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_work_goes_tensor_by_tensor(backend):
    """Of 27 tensors; any such operation would have 27 launches or more."""
    for method, changes in (("adamw", {}), (METHOD, {}), (METHOD, EIGHTH)):
        counter = counted("tiny", 2048, backend, method, changes)
        # A list of the plain backend's: a share, or a scale by step counts on the device, for each tensor.
        apart = {"_foreach_lerp_", "_foreach_add_", "_foreach_mul"} if backend == "torch" else set()
        assert all(count < 27 for name, count in counter.launches.items() if name not in apart)
        assert counter.trunk > 100


def test_command_prints_and_writes_the_launches(tmp_path, capsys):
    path = tmp_path / "launches.json"
    options = cli.GpuOptions(what="launches", shape="tiny", tokens=1024, only=f"adamw,{METHOD}", json=path)
    assert cli.run(options) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["backend"], row["method"]) for row in rows] == [
        (backend, method) for backend in ("torch", "triton") for method in ("adamw", METHOD)
    ]
    for adamw, exact in (rows[:2], rows[2:]):
        assert exact["trunk"] == 2 * adamw["trunk"]
        assert exact["x_adamw"] == exact["launches"] / adamw["launches"]
        assert adamw["launches"] == adamw["trunk"] + sum(adamw["by_operation"].values())
    assert rows[2]["beside"] < rows[0]["beside"]
    assert "launches" in capsys.readouterr().out
