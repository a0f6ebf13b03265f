"""A step that is not finite is skipped: what depends on the number of steps counts the completed ones, everywhere."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_runs import arguments, final_weights, fsam

from fsam_trainers.jax.engine import JaxEngine
from fsam_trainers.torch.engine import TorchEngine

STEPS, SKIPPED, RHO, RATE = 9, (2, 5), 0.1, 0.01
PACE = (
    "--steps",
    STEPS,
    "--warmup",
    3,
    "--checkpoint-every",
    4,
    "--evaluate-every",
    0,
    "--probe-steps",
    0,
    "--keep",
    9,
)
SCHEDULE = ("--every", 2, "--start", 0.1, "--rho-schedule", "learning-rate", "--rho", RHO)
SMALLER = ("--learning-rate", RATE, "--warmup", 3, "--layers", 1, "--width", 16, "--heads", 2, "--dropout", 0.1)


@pytest.fixture(autouse=True)
def _not_finite(monkeypatch):
    """The weights are NaN in the steps SKIPPED, and what they were again after them."""

    def in_jax(self, tokens, index):
        if index not in SKIPPED:
            return jax_step(self, tokens, index)
        params = jax.tree.map(jnp.copy, self.state.params)
        self.state = self.state._replace(params=jax.tree.map(lambda x: x * jnp.nan, params))
        report = jax_step(self, tokens, index)
        self.state = self.state._replace(params=params)
        return report

    def in_torch(self, tokens, index):
        if index not in SKIPPED:
            return torch_step(self, tokens, index)
        kept = [p.detach().clone() for p in self.model.parameters()]
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(torch.nan)
            report = torch_step(self, tokens, index)
            for p, value in zip(self.model.parameters(), kept, strict=True):
                p.copy_(value)
        return report

    jax_step, torch_step = JaxEngine.step, TorchEngine.step
    monkeypatch.setattr(JaxEngine, "step", in_jax)
    monkeypatch.setattr(TorchEngine, "step", torch.enable_grad()(in_torch))


def lines(out) -> list[dict]:
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [x for x in found if "kind" in x]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_schedules_and_metrics_count_completed_steps(framework, text, tmp_path):
    out = tmp_path / "run"
    command = arguments(text, out, "--framework", framework, *PACE, *SCHEDULE, *SMALLER)
    assert fsam(*command) == 0
    found = lines(out)
    assert [x["step"] - 1 for x in found if x["skipped"]] == list(SKIPPED)
    # The steps 2 and 5 are skipped: their successors take their place in every schedule.
    completed = [0, 1, 2, 2, 3, 4, 4, 5, 6]
    rates = [RATE * n / 3 if n < 3 else x["learning_rate"] for n, x in zip(completed, found, strict=True)]
    np.testing.assert_allclose([x["learning_rate"] for x in found], rates, rtol=1e-6)
    for n, x in zip(completed, found, strict=True):
        assert x["kind"] == ("corrected" if n % 2 else "plain"), x
        # What the engine did, and not what the loop believes: ε is as long as that step's ρ, or there is none.
        length = RHO * x["learning_rate"] / RATE if n % 2 else 0.0
        assert x["skipped"] or x["perturbation_norm"] == pytest.approx(length, rel=1e-5), x
    # Resumed between the two, the run goes the same way.
    weights, before = final_weights(command), [{**x, "step_ms": 0, "seconds": 0} for x in found]
    for step in (8, 9):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    assert fsam(*command) == 0
    assert json.dumps([{**x, "step_ms": 0, "seconds": 0} for x in lines(out)]) == json.dumps(before)
    for name, weight in final_weights(command).items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)


@pytest.mark.slow
def test_the_next_step_is_started_before_the_last_is_read(text, tmp_path, monkeypatch):
    """The JAX engine waits for a step only where the next one's kind depends on it."""
    read = []
    kind = JaxEngine._kind

    def counted(self):
        unread = len(self._unread)
        found = kind(self)
        read.append(unread - len(self._unread))
        return found

    monkeypatch.setattr(JaxEngine, "_kind", counted)
    command = arguments(text, tmp_path / "run", "--framework", "jax", *PACE, *SMALLER, "--start", 0.6)
    assert fsam(*command, "--checkpoint-every", 0) == 0
    # The step before the last is over anyway. Two are skipped: the ninth step is the first that may be corrected.
    assert read == [0, 0, 1, 1, 1, 1, 1, 1, 2]
