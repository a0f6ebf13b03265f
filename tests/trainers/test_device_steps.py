"""PyTorch on a device: the host starts a step before it reads the last one's figures, and the run is the same."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from small_runs import arguments, final_weights, fsam, train_options

from fsam_core.torch import update
from fsam_trainers import registry
from fsam_trainers.models import torch_decoder
from fsam_trainers.torch.engine import TorchEngine

METHOD = ("--method", "precond-functional-sam", "--correction-fraction", "1/4", "--rho", 0.1, "--seed", 3)
OPTIONS = ("--framework", "torch", "--backend", "torch", *METHOD, "--ema", 0.5, "--heads", 2, "--probe-steps", 0)
STEPS, SKIPPED = 9, (0, 5)
PACE = ("--steps", STEPS, "--warmup", 3, "--evaluate-every", 6, "--checkpoint-every", 4, "--keep", 9)
TIMES = {"step_ms": 0, "seconds": 0}


@pytest.fixture
def device(monkeypatch) -> list[str]:
    """The CPU stands in for a device that figures arrive from only where the host waits; returns what happened."""
    events, numbers, arrived = [], {}, set()
    own_init, own_step, own_read = TorchEngine.__init__, TorchEngine.step, update.Figures.read

    def init(self, settings):
        own_init(self, settings)
        self.asynchronous = True

    def step(self, batch, index):
        report = own_step(self, batch, index)
        events.append(f"started {index}")
        numbers[self._step._unread[-1].figures] = index
        return report

    def read(figures):
        if figures not in arrived:
            arrived.add(figures)
            events.append(f"waited for {numbers[figures]}")
        return own_read(figures)

    monkeypatch.setattr(update, "can_stay_on_device", lambda *_: True)
    monkeypatch.setattr(TorchEngine, "__init__", init)
    monkeypatch.setattr(TorchEngine, "step", step)
    monkeypatch.setattr(update.Figures, "read", read)
    monkeypatch.setattr(update.Figures, "has_arrived", lambda figures: figures in arrived)
    return events


def break_steps(monkeypatch) -> None:
    """The last hidden states are NaN in the steps SKIPPED."""
    own_features, own_step, index = torch_decoder.features, TorchEngine.step, [0]

    def features(*given, **options):
        head = own_features(*given, **options)
        return dataclasses.replace(head, hidden=head.hidden * torch.nan) if index[0] in SKIPPED else head

    def step(self, batch, number):
        index[0] = number
        report = own_step(self, batch, number)
        index[0] = -1
        return report

    monkeypatch.setattr(torch_decoder, "features", features)
    monkeypatch.setattr(TorchEngine, "step", step)


def lines(out) -> list[dict]:
    return [json.loads(x) | TIMES for x in (out / "metrics.jsonl").read_text().splitlines()]


def test_next_step_starts_before_the_last_is_read(text, tmp_path, device):
    pace = ("--steps", 6, "--evaluate-every", 4, "--checkpoint-every", 0)
    assert fsam(*arguments(text, tmp_path / "run", *OPTIONS, *pace)) == 0
    first, second = (
        [f"started {i}", f"started {i + 1}", f"waited for {i}", *more, f"waited for {last}"]
        for i, last, more in (
            (0, 3, ["started 2", "waited for 1", "started 3", "waited for 2"]),
            (4, 5, []),
        )
    )
    assert device == first + second  # everything is read before the evaluation after step 4, and at the end


def test_schedule_waits_for_the_number_of_the_step(text, tmp_path, device):
    """The negative control."""
    pace = ("--steps", 3, "--evaluate-every", 0, "--checkpoint-every", 0, "--every", 2)
    assert fsam(*arguments(text, tmp_path / "run", *OPTIONS, *pace)) == 0
    assert device == [f"{what} {i}" for i in range(3) for what in ("started", "waited for")]


def test_run_is_that_of_the_host_and_resumes(text, tmp_path, monkeypatch, request):
    commands = [arguments(text, tmp_path / name, *OPTIONS, *PACE) for name in ("host", "device")]
    with monkeypatch.context() as patch:
        break_steps(patch)
        assert fsam(*commands[0]) == 0
        host, weights = lines(tmp_path / "host"), final_weights(commands[0])
    request.getfixturevalue("device")
    break_steps(monkeypatch)
    assert fsam(*commands[1]) == 0
    out = tmp_path / "device"
    found, ours = lines(out), final_weights(commands[1])
    assert [x["step"] - 1 for x in found if x.get("skipped")] == list(SKIPPED)
    for got, want in zip(found, host, strict=True):
        exact = {name for name, x in want.items() if not isinstance(x, float)} | {"learning_rate", "rho"}
        assert {name: got[name] for name in exact & want.keys()} == {name: want[name] for name in exact & want.keys()}
        assert got == {name: pytest.approx(x, rel=1e-4) if isinstance(x, float) else x for name, x in want.items()}
    for name, weight in weights.items():
        np.testing.assert_allclose(ours[name], weight, rtol=1e-3, atol=1e-6, err_msg=name)
    # Resumed where nothing is known of the last step but its checkpoint, the run is the same to the bit.
    for step in (8, 9):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    assert fsam(*commands[1]) == 0
    assert json.dumps(lines(out)) == json.dumps(found)
    for name, weight in final_weights(commands[1]).items():
        np.testing.assert_array_equal(weight, ours[name], err_msg=name)


def test_steps_on_tensors_without_storage_read_nothing(text, tmp_path, monkeypatch):
    fused = torch._fused_adamw_  # which knows such tensors with a number for a rate alone
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, lr, **options: fused(*lists, lr=0.1, **options))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    command = arguments(text, tmp_path / "run", *OPTIONS, *PACE, "--dtype", "bfloat16")
    settings = train_options(command).settings()
    model = registry.make(settings)
    assert model.asynchronous
    tokens = np.zeros((settings.batch, settings.model.seq_len + 1), np.int32)
    report = model.step(tokens, 0)
    model.step(tokens, 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        report()
