"""PyTorch's own passes, counted by operation: in the head, and over weights and gradients of a step."""

from __future__ import annotations

import importlib.util
import json

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

import torch

from fsam_kernels.shapes import HEADS, Head
from fsam_profiling.gpu import cli, code, kernels, step
from fsam_profiling.gpu.passes import PARTS, PassCounter, head_glue


def counted(call, **options):
    with PassCounter(**options) as counter:
        call()
    return dict(counter.bytes)


def test_operations_have_their_known_bytes():
    x, y = torch.ones(10, 6), torch.ones(10, 6)
    half, row = x.bfloat16(), torch.ones(6)
    out = torch.empty(10, 6)
    assert counted(lambda: x + y) == {"add": 3 * 240}
    assert counted(lambda: x.add_(y)) == {"add_": 3 * 240}
    assert counted(lambda: torch.add(x, y, out=out)) == {"add": 3 * 240}
    assert counted(lambda: x.mul_(2)) == {"mul_": 2 * 240}
    assert counted(lambda: out.copy_(half)) == {"copy_": 120 + 240}
    assert counted(lambda: out.zero_()) == {"zero_": 240}
    assert counted(lambda: half.float()) == {"_to_copy": 120 + 240}
    assert counted(lambda: x * row.expand(10, 6)) == {"mul": 2 * 240 + 24}
    assert counted(lambda: torch.nn.functional.embedding(torch.tensor([1, 2]), x)) == {"embedding": 2 * 48}
    assert counted(lambda: torch._foreach_add_([x, y], 1.0)) == {"_foreach_add_": 4 * 240}


def test_products_views_and_allocations_move_nothing():
    x = torch.ones(10, 6)
    nothing = lambda: (x @ x.T, x.T[2:], torch.empty_like(x), torch.addmm(x.new_empty(6), x, x.new_empty(6, 6)))
    assert counted(nothing) == {}

    def in_place():
        x[2:4] += 1.0  # its second copy, of a view onto itself, is one that PyTorch skips

    assert counted(in_place) == {"add_": 2 * 48}


def test_counting_pauses_and_selects():
    x, small = torch.ones(10, 6), torch.ones(3)
    with PassCounter(lambda tensor: tensor.numel() == 60) as counter:
        _ = small + small
        _ = x + x
        with counter.paused():
            _ = x + x
    assert counter.bytes == {"add": 3 * 240}
    assert counter.operations["add"] == 1
    assert counter.by_elements == {60: 3 * 240}


def test_glue_of_a_first_pass_is_one_cast_of_w_bar():
    head = Head(8192, 64, 100_000)
    counter = head_glue(head, [PARTS["first"]])
    of_w, of_h = head.V * head.D, head.N * head.D
    # w̄ from float32 to bfloat16; h̄ and h times the weights.
    assert counter.bytes["_to_copy"] == pytest.approx(6 * of_w, rel=2e-3)
    assert counter.total == pytest.approx(6 * of_w + (4 + 4) * of_h, rel=2e-2)
    in_half = head_glue(head, [PARTS["first"]], torch.float16)
    assert in_half.total == pytest.approx(counter.total + 8 * of_w, rel=2e-2)  # the unit of float16


def test_glue_at_the_largest_head_is_a_quarter_of_the_goal():
    first, second = (head_glue(HEADS["llama3-8b"], [PARTS[name]]).total for name in ("first", "second"))
    assert 3e9 < first < 4e9  # 68.6e9 with chunks of 697 rows, and blocks of w̄ added apart
    assert 3e9 < second < 4e9  # 10.8e9


def test_command_prints_and_writes_the_passes(tmp_path, capsys):
    path = tmp_path / "passes.json"
    assert cli.run(cli.GpuOptions(what="passes", shape="24m", json=path)) == 0
    first, second = json.loads(path.read_text())["rows"]
    assert (first["part"], second["part"], first["rows"]) == ("first", "second", 4096)
    assert first["bytes"] == sum(first["by_operation"].values()) == head_glue(HEADS["24m"], [PARTS["first"]]).total
    assert "rows a chunk" in capsys.readouterr().out


def test_step_passes_over_weights_are_those_of_its_method():
    adamw, exact = (step.calls("24m", name, {}) for name in ("adamw", "precond-functional-sam"))
    # A gradient is read in bfloat16, written in float32 and read for the norm that clips it.
    assert adamw.other_pass_bytes == pytest.approx(2 + 4 + 4, rel=0.01)
    assert exact.other_pass_bytes == pytest.approx(2 * adamw.other_pass_bytes, rel=0.01)
    assert adamw.vocabulary_pass_bytes > adamw.other_pass_bytes
    assert [call.operation for call in exact.of_head] == ["linear_cross_entropy", "logit_vjp"]
    assert exact.of_head[0].keep
    assert exact.of_head[0].gradient


def test_h200_is_sm_90_with_its_own_bandwidth():
    h200, h100 = code.BY_NAME["h200"], code.BY_NAME["sm_90"]
    assert (h200.name, h200.bandwidth) == ("H200 SXM", 4.8e12)
    assert h200._replace(name=h100.name, bandwidth=h100.bandwidth) == h100
    assert "h200" not in code.CARDS  # `all` compiles each architecture once


@pytest.mark.parametrize(
    ("device", "names"), [("NVIDIA H200", ("sm_90", "h200")), ("NVIDIA H100 80GB HBM3", ("sm_90",))]
)
def test_card_in_the_machine_is_known_by_name(monkeypatch, device, names):
    class Properties:
        name, major, minor = device, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert kernels.present() == names


def test_no_card_has_no_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.present() == ()
