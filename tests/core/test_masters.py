"""bfloat16 compute weights over float32 masters: what is written, what is restored, and what arrives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from problems import METHODS, Weights, as_torch, batch_of, mlp, values

from fsam_core.torch import (
    SAM,
    AdamW,
    FunctionalSAM,
    LinearHead,
    LogitSAM,
    Memory,
    MicroBatches,
    Plain,
    Schedule,
    Step,
    UserError,
    masters,
)
from fsam_kernels.torch.rounding import Rounding

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def batch(seed: int = 1, n: int = 12) -> dict:
    return as_torch(batch_of(n, seed, dtype="float32"))


def bf16_mlp(p, batch):
    """As `mlp`, whose inputs are float32, in the weights' dtype."""
    return mlp(p, {**batch, "x": batch["x"].to(p["a"].dtype)})


def made(method, *, features=bf16_mlp, lr=1e-3, seed=0, **options) -> tuple[Weights, AdamW, Step]:
    model = Weights(values(seed, dtype="float32"))
    copies = masters(model)
    optimizer = AdamW(copies, lr=lr, betas=(0.9, 0.95), copies=copies)
    return model, optimizer, Step(model, optimizer, method, features=features, **options)


def is_cast(model: Weights, optimizer: AdamW) -> bool:
    return all(torch.equal(master.to(p.dtype), p) for master, p in optimizer.copies.items())


def off_by(method, batches: list[dict], memory: Memory) -> float:
    """‖ĝ of bfloat16 weights over masters − ĝ of float32 weights‖ / ‖the latter‖, at the same weights."""
    model, optimizer, step = made(method, clip_norm=1.0, memory=memory)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert is_cast(model, optimizer)
    wide = Weights({name: p.detach().float().numpy() for name, p in model.named_parameters()})
    # The masters are not what the model computes with, and the base pass of the other must be at the same weights.
    for master, p in zip(optimizer.copies, wide.parameters(), strict=True):
        master.data.copy_(p)
    other = Step(wide, AdamW(wide.parameters(), lr=1e-3, betas=(0.9, 0.95)), method, features=mlp, clip_norm=1.0)
    step.gradient(MicroBatches(batches))
    other.gradient(MicroBatches(batches))
    assert all(p.grad is None for p in model.parameters())
    got = torch.cat([master.grad.flatten() for master in optimizer.copies])
    assert got.dtype == torch.float32
    expected = torch.cat([p.grad.flatten() for p in wide.parameters()])
    return float((got - expected).norm() / expected.norm())


def off_by_autograd(batches: list[dict]) -> float:
    """The same of PyTorch's own cross entropy and autograd in bfloat16."""
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Weights(values(dtype="float32")).to(torch.bfloat16).to(dtype)
        loss = 0
        for b in batches:
            z = torch.tanh(b["x"].to(dtype) @ model.a) @ model.w.T
            loss = loss + torch.nn.functional.cross_entropy(z, b["y"], ignore_index=-1, reduction="sum")
        loss.backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    return float((grads[0] - grads[1]).norm() / grads[1].norm())


@pytest.mark.parametrize("form", ["keep", "recompute"])
@pytest.mark.parametrize("micro", [False, True])
# Without a second moment yet "previous" divides by 0, and the direction is what rounding makes of the least gradient.
@pytest.mark.parametrize("method", [m for m in METHODS.values() if getattr(m, "second_moment", "") != "previous"])
def test_step_matches_float32_to_bfloat16_precision(method, micro, form):
    batches = [batch(1), batch(2)] if micro else [batch(1)]
    assert off_by(method, batches, Memory(form)) < 3 * off_by_autograd(batches)


@each_method
def test_after_a_step_the_copies_are_the_masters_rounded(method):
    model, optimizer, step = made(method)
    before = [m.detach().clone() for m in optimizer.copies]
    for seed in range(3):
        step(MicroBatches([batch(seed), batch(seed + 7)]))
        assert is_cast(model, optimizer)
    assert not any(torch.equal(x, m) for x, m in zip(before, optimizer.copies, strict=True))


@pytest.mark.parametrize("kind", [SAM, FunctionalSAM, LogitSAM])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_copies_are_restored_when_the_second_pass_raises(kind, error):
    calls = []

    def features(model, batch):
        calls.append(None)
        if len(calls) == 2:
            raise error
        return bf16_mlp(model, batch)

    model, optimizer, step = made(kind(5.0), features=features)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)):
        step(batch())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert is_cast(model, optimizer)


@pytest.mark.parametrize("kind", [SAM, FunctionalSAM, LogitSAM])
def test_copies_are_restored_without_an_update(kind):
    bad = batch()
    bad["x"][0, 0] = float("inf")
    model, optimizer, step = made(kind(5.0))
    step.gradient(batch())
    assert is_cast(model, optimizer)
    step(bad)
    assert step.info.skipped
    assert is_cast(model, optimizer)


def test_second_pass_reads_perturbed_masters_rounded_once():
    """Not the copies moved: of a step below half an ulp those would keep nothing."""
    seen = []

    def features(model, batch):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return bf16_mlp(model, batch)

    rho = 1e-3
    model, optimizer, step = made(FunctionalSAM(rho), features=features)
    theta = {name: m.detach().clone() for name, m in zip(dict(model.named_parameters()), optimizer.copies, strict=True)}
    step.gradient(batch())
    names = list(theta)
    at, moved = seen
    # ε is not told by the step; what arrives must be ε rounded at θ, not at the copy.
    arrived = torch.cat([(moved[k].float() - at[k].float()).flatten() for k in names])
    assert step.info.perturbation_norm == pytest.approx(rho, rel=1e-3)
    assert float(arrived.norm()) > 0
    rounded = all(torch.equal(moved[k], moved[k].float().to(torch.bfloat16)) for k in names)
    assert rounded


def test_random_rounding_repeats_from_its_seed():
    def trained(seed: int) -> list[torch.Tensor]:
        model, optimizer, step = made(FunctionalSAM(0.1, precondition="adam"))
        optimizer.rounding = Rounding(stochastic=True, seed=seed)
        for i in range(3):
            step(batch(i))
        return [p.detach().clone() for p in model.parameters()]

    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert same(trained(1), trained(1))
    assert not same(trained(1), trained(2))


def test_tied_and_frozen_weights_have_masters():
    model = Weights(values(dtype="float32"))
    model.a.requires_grad_(False)
    copies = masters(model)
    assert [m.requires_grad for m in copies] == [False, True]
    optimizer = AdamW([m for m in copies if m.requires_grad], lr=1e-3, copies=copies)
    step = Step(model, optimizer, FunctionalSAM(0.1), features=bf16_mlp)
    before = model.a.detach().clone()
    step(batch())
    assert torch.equal(model.a, before)
    assert is_cast(model, optimizer)


def test_plain_steps_between_write_the_copies():
    model, optimizer, step = made(FunctionalSAM(0.1), schedule=Schedule(every=2))
    for i in range(4):
        step(batch(i))
        assert is_cast(model, optimizer)


def test_bfloat16_head_trains_like_float32():
    """The loss of 60 steps over masters follows that of float32 weights."""
    runs = {}
    for name in ("float32", "bfloat16"):
        model = Weights(values(dtype="float32"))
        copies = masters(model) if name == "bfloat16" else {}
        optimizer = AdamW(copies or model.parameters(), lr=2e-2, betas=(0.9, 0.95), copies=copies)
        features = bf16_mlp if copies else mlp
        step = Step(model, optimizer, FunctionalSAM(0.1, precondition="adam"), features=features, clip_norm=1.0)
        runs[name] = np.array([float(step(batch(i % 4))) for i in range(60)])
    assert runs["float32"][-4:].mean() < 0.7 * runs["float32"][:4].mean()
    np.testing.assert_allclose(runs["bfloat16"], runs["float32"], rtol=0.1)


def test_plain_over_masters_is_mixed_precision_training():
    model, optimizer, step = made(Plain())
    step(batch())
    assert isinstance(bf16_mlp(model, batch()), LinearHead)
    assert is_cast(model, optimizer)


def test_head_gradient_over_masters_is_as_it_was_summed():
    """The head's gradient stays in float32; what autograd gives has the weights' bits."""
    _, optimizer, step = made(FunctionalSAM(0.1))
    step.gradient(batch())
    of_a, of_w = (master.grad for master in optimizer.copies)
    assert torch.equal(of_a, of_a.bfloat16().float())
    assert not torch.equal(of_w, of_w.bfloat16().float())


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("bits", ["nearest", "random"])
def test_a_checkpoint_of_the_optimizer_has_the_masters(model_first, bits):
    model, optimizer, step = made(FunctionalSAM(0.1, precondition="adam"))
    optimizer.rounding = Rounding(bits == "random", 1)
    for i in range(3):
        step(batch(i))
    saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, step)]
    step(batch(3))
    other, other_optimizer, other_step = made(FunctionalSAM(0.1, precondition="adam"), seed=5)
    other_optimizer.rounding = optimizer.rounding
    pairs = list(zip((other, other_optimizer, other_step), saved, strict=True))
    for one, state in pairs if model_first else pairs[::-1]:
        one.load_state_dict(state)
    other_step(batch(3))
    for a, b in ((model.parameters(), other.parameters()), (optimizer.copies, other_optimizer.copies)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    torch.optim.AdamW([m.detach().clone() for m in optimizer.copies]).load_state_dict(saved[1])


def test_weights_that_others_wrote_over_their_masters_are_refused():
    model, _, step = made(Plain())
    step(batch())
    model.load_state_dict(model.state_dict())  # the same values
    step(batch())
    model.load_state_dict(Weights(values(3, dtype="float32")).state_dict())
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of its weights are no longer their masters rounded, as after"):
            step(batch())


def test_a_copy_of_model_optimizer_and_step_trains_alike():
    model, optimizer, step = made(FunctionalSAM(0.1))
    step(batch())
    other, other_optimizer, other_step = copy.deepcopy((model, optimizer, step))
    assert other_step(batch(1)) == step(batch(1))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
    assert list(other_optimizer.copies.values()) == list(other.parameters())
