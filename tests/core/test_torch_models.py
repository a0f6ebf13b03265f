"""What the PyTorch step does with a user's model: parameters of every kind, random numbers, running statistics."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loop_model import RHO, D, Model, batch_of, made
from problems import METHODS, Weights, adamw, float32, mlp, moments
from problems import float32_batch as batch
from torch import nn

from fsam_core.torch import (
    SAM,
    FunctionalSAM,
    LinearHead,
    Logits,
    LogitSAM,
    MicroBatches,
    Plain,
    Schedule,
    Step,
    UserError,
)

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
perturbed = pytest.mark.parametrize("kind", [SAM, FunctionalSAM, LogitSAM])


# --- parameters of every kind -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A frozen layer, an unused parameter, and a head tied to the input weights."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(9, 6))
        self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.head = self.embedding if tied else nn.Parameter(torch.randn(9, 6))


def odd_features(model, batch):
    h = torch.tanh(model.embedding[batch["x"].abs().long().sum(1) % 9] @ model.frozen)
    return LinearHead(h, model.head, batch["y"])


@each_method
def test_frozen_unused_and_tied_parameters(method):
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step = Step(model, optimizer, method, features=odd_features)
    for seed in range(2):
        step(batch(seed))
    assert not step.info.skipped
    assert set(before) == {"embedding", "frozen", "unused"}
    assert torch.equal(model.frozen, before["frozen"])
    assert torch.equal(model.unused, before["unused"])
    assert model.unused.grad is None
    assert not torch.equal(model.embedding, before["embedding"])
    assert model.head is model.embedding


@perturbed
def test_frozen_trunk_or_frozen_head_is_allowed(kind):
    for name in ("embedding", "head"):
        model = Odd(tied=False)
        getattr(model, name).requires_grad_(False)
        step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), kind(0.3), features=odd_features)
        assert torch.isfinite(step(batch()))
        assert not step.info.skipped
        assert step.info.perturbation_norm == pytest.approx(0.3)


@each_method
def test_hook_on_a_tied_head_sees_the_whole_gradient(method):
    def grad(hooked):
        model, seen = Odd(), []
        step = Step(model, torch.optim.AdamW(model.parameters(), lr=0.1), method, features=odd_features)
        if hooked:
            model.embedding.register_hook(lambda grad: seen.append(grad.clone()))
        for seed in range(2):
            step.gradient(MicroBatches([batch(seed), batch(seed + 7)]))
        return model.embedding.grad, seen

    (plain, _), (hooked, seen) = grad(False), grad(True)
    assert seen
    torch.testing.assert_close(hooked, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_half_precision_models_have_the_gradient_of_float32(method, dtype):
    model = Weights(float32()).to(dtype)
    step = Step(model, adamw(model, moments(float32())), method, features=mlp, clip_norm=1.0)
    micro = [{"x": b["x"].to(dtype), "y": b["y"]} for b in (batch(1), batch(2, n=7))]
    reference = Weights({k: p.detach().float().numpy() for k, p in model.named_parameters()})
    whole = Step(reference, adamw(reference, moments(float32())), method, features=mlp, clip_norm=1.0)
    loss = whole.gradient(MicroBatches({"x": b["x"].float(), "y": b["y"]} for b in micro))
    assert step.gradient(MicroBatches(micro)).item() == pytest.approx(loss.item(), rel=0.05)
    assert not step.info.skipped
    for p, r in zip(model.parameters(), reference.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.float().flatten(), r.grad.flatten(), dim=0) > 0.99
        assert p.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_half_precision_micro_batches_without_targets_have_no_gradient(method, dtype):
    model = Weights(float32()).to(dtype)
    micro = [{"x": b["x"].to(dtype), "y": torch.full_like(b["y"], -1)} for b in (batch(1), batch(2))]
    step = Step(model, adamw(model, moments(float32())), method, features=mlp)
    assert step.gradient(MicroBatches(micro)) == 0
    assert not step.info.skipped
    assert not any(p.grad.any() for p in model.parameters())


# --- randomness and running statistics --------------------------------------------------------------------------------


def dropout(model, batch):
    out = mlp(model, batch)
    return LinearHead(F.dropout(out.hidden, 0.5), out.weight, out.labels)


@perturbed
@pytest.mark.parametrize(
    ("micro", "options"), [(1, {}), (3, {}), (4, {"ascent": "part", "ascent_fraction": 0.5, "strength": 0.5})]
)
def test_both_passes_draw_the_same_random_numbers(kind, micro, options):
    def run(method):
        torch.manual_seed(4)
        model = Weights(float32())
        Step(model, adamw(model), method, features=dropout).gradient(MicroBatches(batch(s) for s in range(micro)))
        return [p.grad for p in model.parameters()], torch.rand(3)

    (plain, drawn), (moved, drawn_too) = run(Plain()), run(kind(0.0, **options))
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert torch.equal(drawn, drawn_too)


@perturbed
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_both_passes_draw_the_same_from_python_and_numpy(kind, draw):
    def masked(model, batch):
        out = mlp(model, batch)
        return LinearHead(out.hidden * draw(), out.weight, out.labels)

    def run(method):
        random.seed(4), np.random.seed(4)  # noqa: NPY002 (transformers' models draw from it)
        model = Weights(float32())
        Step(model, adamw(model), method, features=masked).gradient(batch())
        return [p.grad for p in model.parameters()], draw()

    (plain, drawn), (moved, drawn_too) = run(Plain()), run(kind(0.0))
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert drawn == drawn_too


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 9)


def normed_features(model, batch):
    z = model.head(model.norm(batch["x"]))
    return Logits(z, lambda z: F.cross_entropy(z, batch["y"], ignore_index=-1))


@each_method
def test_running_statistics_are_updated_once_a_step(method):
    models = Normed(), Normed()
    Step(models[0], torch.optim.AdamW(models[0].parameters()), method, features=normed_features)(batch())
    normed_features(models[1], batch())
    assert int(models[0].norm.num_batches_tracked) == 1
    assert torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)
    assert torch.equal(models[0].norm.running_var, models[1].norm.running_var)


# --- what a pass does not reach ---------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts, of which a whole batch goes to one: at θ to the first, at θ+ε to the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.a, self.b = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(3))
        self.at_theta = self.shared.detach().clone()

    def forward(self, x):
        expert = self.a if torch.equal(self.shared, self.at_theta) else self.b
        return torch.tanh(x @ self.shared) @ expert


def experts_run(method, steps: int = 1, **options) -> dict[str, torch.Tensor]:
    """The gradients of the last step."""
    model, x = Experts(), torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of = lambda model, batch: Logits(model(batch), lambda z: F.cross_entropy(z, torch.arange(6) % 4))
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0), method, features=of, **options)
    for _ in range(steps):
        step.gradient(x)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_combined_gradients_are_of_all_that_either_pass_reached():
    products = []

    def combined(alpha, beta):
        def how(gg, gm, mm):
            products.append((float(gg), float(mm)))
            return alpha, beta

        return experts_run(SAM(0.5, combine=how))

    g, moved, both = combined(1.0, 0.0), combined(0.0, 1.0), combined(2.0, 3.0)
    square = lambda gradients: pytest.approx(sum(float(x.square().sum()) for x in gradients.values()), rel=1e-12)
    assert products == [(square(g), square(moved))] * 3
    assert float(g["a"].norm()) > 0 < float(moved["b"].norm())
    assert both.keys() == {"shared", "a", "b"}
    for name, x in both.items():
        torch.testing.assert_close(x, 2 * g[name] + 3 * moved[name])


def test_reused_correction_is_of_all_that_either_pass_reached():
    """At equal weights the second step is g + (g' − g): of the first expert 0, and the second has no gradient at θ."""
    corrected, plain = experts_run(SAM(0.5)), experts_run(Plain())
    assert corrected.keys() == {"shared", "b"}
    assert plain.keys() == {"shared", "a"}
    reused = experts_run(SAM(0.5), 2, schedule=Schedule(every=2, between="reuse"))
    torch.testing.assert_close(reused["shared"], corrected["shared"])
    torch.testing.assert_close(reused["a"], torch.zeros_like(plain["a"]))


@pytest.mark.parametrize("method", [SAM(RHO), FunctionalSAM(RHO, norm="per-tensor")])
def test_complex_weights_are_pairs_of_real_ones(method):
    class Rotated(Model):
        def __init__(self, parts: bool) -> None:
            super().__init__()
            turn = torch.randn(D, D, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            self.turn = nn.Parameter(turn if parts else torch.view_as_complex(turn))

        def trunk(self, x):
            turn = self.turn if self.turn.is_complex() else torch.view_as_complex(self.turn)
            return (super().trunk(x).to(turn.dtype) @ turn).real

    found = []
    for parts in (True, False):
        model, step = made(method, model=Rotated(parts), clip_norm=0.1)
        for i in range(3):
            step(batch_of(i))
        found.append([torch.view_as_real(p) if p.is_complex() else p for p in model.parameters()])
    assert all((x - y).abs().max() < 1e-14 for x, y in zip(*found, strict=True))
    with pytest.raises(UserError, match="turn is complex, and precondition='adam' is for real numbers"):
        made(FunctionalSAM(RHO, precondition="adam"), model=Rotated(parts=False))
    made(FunctionalSAM(RHO, precondition="adam", scope=lambda name: name != "turn"), model=Rotated(parts=False))
