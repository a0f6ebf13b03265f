"""float16 compute weights over float32 masters: cotangents that float16 cannot hold, steps that overflow."""

from __future__ import annotations

import math

import pytest
import torch
from problems import METHODS
from torch import nn

from fsam_core.torch import (
    SAM,
    AdamW,
    FunctionalSAM,
    LinearHead,
    LossScale,
    MicroBatches,
    Plain,
    Step,
    UserError,
    masters,
)

V, D, N = 11, 8, 4096
# With the previous moment, 0 before the first step, ε is ρ g / eps there: beyond float16.
METHODS = {name: one for name, one in METHODS.items() if "previous" not in name}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


class Model(nn.Module):
    """A head with weights so small that h̄, a few of them over N tokens, is below what float16 holds."""

    def __init__(self, head: float = 1e-3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(D, D, generator=generator))
        self.w = nn.Parameter(torch.randn(V, D, generator=generator) * head)


def features(model, batch):
    return LinearHead(torch.tanh(batch["x"].to(model.a.dtype) @ model.a), model.w, batch["y"])


def batch(seed: int = 0, n: int = N) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, D, generator=generator), "y": torch.randint(-1, V, (n,), generator=generator)}


def made(method, loss_scale=None, dtype=torch.float16, **options) -> Step:
    model = Model(**options)
    copies = masters(model, dtype) if dtype != torch.float32 else {}
    optimizer = AdamW(copies or model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-12, copies=copies)
    return Step(model, optimizer, method, features=features, clip_norm=1.0, loss_scale=loss_scale)


def gradient(step: Step, batches) -> list[torch.Tensor]:
    step.gradient(MicroBatches(batches))
    assert not step.info.skipped
    return [p.grad for group in step.optimizer.param_groups for p in group["params"]]


def off_by(method, loss_scale) -> float:
    """Of the trunk's gradient, from that of float32 weights."""
    batches = [batch(0), batch(1, N // 2)]
    got, expected = (
        gradient(made(method, loss_scale), batches)[0],
        gradient(made(method, None, torch.float32), batches)[0],
    )
    return float((got - expected).norm() / expected.norm())


@each_method
def test_gradients_are_float32s_to_float16s_precision(method):
    assert off_by(method, LossScale()) < 1e-2


def test_without_a_scale_they_are_lost():
    assert off_by(Plain(), None) > 10 * off_by(Plain(), LossScale())


def test_loss_is_not_scaled():
    step = made(SAM(1e-4), LossScale())
    loss = step(batch())
    assert loss == pytest.approx(math.log(V), rel=1e-2)
    assert step.info.loss == pytest.approx(float(loss))
    assert step.info.perturbed_loss == pytest.approx(float(loss), rel=1e-2)


@pytest.mark.parametrize("method", [Plain(), FunctionalSAM(0.1, precondition="adam", fraction=1 / 4, cut="hidden")])
def test_overflow_skips_steps_and_lowers_the_scale(method):
    step = made(method, LossScale(initial=2.0**40), head=1.0)
    before = [p.detach().clone() for p in step.model.parameters()]
    for _ in range(30):
        step(batch())
        if not step.info.skipped:
            break
        assert all(torch.equal(p, x) for p, x in zip(step.model.parameters(), before, strict=True))
    assert 10 < step.skipped_steps < 30
    assert step.steps == 1
    assert step.state_dict()["loss_scale"] == {"scale": 2.0 ** (40 - step.skipped_steps), "finite": 1}
    assert not torch.equal(step.model.a, before[0])


def test_scale_grows_and_is_restored_from_a_checkpoint():
    how = LossScale(initial=8.0, interval=3)
    step, other = made(Plain(), how), made(Plain(), how)
    for i in range(4):
        step(batch(i))
    state = step.state_dict()
    assert state["loss_scale"] == {"scale": 16.0, "finite": 1}
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.load_state_dict({"steps": 0, "skipped_steps": 0})  # of a run without one
    assert other.state_dict()["loss_scale"] == state["loss_scale"]


def test_unsupported_scaling_is_refused():
    model = Model()
    with pytest.raises(
        UserError, match="loss_scale: it is undone where gradients go to float32 masters; give an AdamW"
    ):
        Step(model, AdamW(model.parameters()), Plain(), features=features, loss_scale=LossScale())
    with pytest.raises(UserError, match="loss_scale: initial must be a finite number > 0, got 0"):
        made(Plain(), LossScale(initial=0))
    with pytest.raises(UserError, match=r"loss_scale: growth must be >= 1, backoff in \(0, 1\] and interval >= 1"):
        made(Plain(), LossScale(backoff=2))
