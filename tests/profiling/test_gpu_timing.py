"""The timed step waits for the device, without which one step's update would fall into the next one's time."""

from __future__ import annotations

import pytest
import torch

from fsam_profiling.timing import matmul_rate, step
from fsam_trainers import device, timing


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator as far as PyTorch says, and the calls that wait for it."""
    waits = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    return waits


def test_wait_is_the_accelerators_in_pytorch_alone(accelerator):
    device.waiting(["jax"])()
    assert not accelerator
    device.waiting(["jax", "torch"])()
    assert accelerator == [1]
    assert device.platform("torch") == "cuda"
    assert matmul_rate.sizes("torch") == matmul_rate.LARGE


def test_cpu_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: pytest.fail("nothing to wait for"))
    device.waiting(["torch"])()


def test_step_is_timed_between_two_waits(monkeypatch):
    waits, seen = [], []

    class Stop(Exception):
        pass

    def interleaved(runs, repeats, tick, *, warm_up, wait):
        seen.append(wait)
        raise Stop

    monkeypatch.setattr(device, "waiting", lambda frameworks: lambda: waits.append(tuple(frameworks)))
    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(matmul_rate, "flops_per_second", lambda *_: 1.0)
    monkeypatch.setattr(step, "_made", lambda timed: dict.fromkeys(timed, lambda index: None))
    monkeypatch.setattr(step.variants, "flops", lambda variant, run: 1)
    with pytest.raises(Stop):
        step.measure(step.StepOptions(framework="torch", only="adamw", peers=False))
    seen[0]()
    assert waits == [("torch",)]
