"""What only the PyTorch step does: it swaps weights and steps an optimizer that the user owns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import B2, EPS, METHODS, Weights, adamw, float32, mlp, moments
from problems import float32_batch as batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_core.torch import SAM, FunctionalSAM, LinearHead, LogitSAM, MicroBatches, Plain, Step, UserError
from fsam_kernels.memory import AUTO, Memory

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
perturbed = pytest.mark.parametrize("kind", [SAM, FunctionalSAM, LogitSAM])


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of the weights, of all buffers and of the optimizer's tensors."""
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*model.parameters(), *model.buffers(), *state)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- exceptions -------------------------------------------------------------------------------------------------------


class RaisingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


@perturbed
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("where", ["forward 1", "forward 2", "backward 1", "backward 2"])
def test_weights_are_restored_bit_for_bit_when_a_pass_raises(kind, where, error):
    model, calls = Weights(float32()), []
    optimizer = adamw(model, moments(float32()))

    def features(model, batch):
        calls.append(None)
        out, (what, nth) = mlp(model, batch), where.split()
        if len(calls) != int(nth) + (where == "backward 2" and kind is LogitSAM):
            return out
        if what == "forward":
            raise error
        return LinearHead(RaisingBackward.apply(out.hidden, error), out.weight, out.labels)

    before, pointers = everything(model, optimizer), [p.data_ptr() for p in model.parameters()]
    step = Step(model, optimizer, kind(0.5), features=features)
    with pytest.raises(type(error)):
        step(batch())
    assert same(before, everything(model, optimizer))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert (step.steps, step.skipped_steps) == (0, 0)


def test_bad_rho_of_a_schedule_is_refused_and_changes_nothing():
    model = Weights(float32())
    optimizer = adamw(model)
    before = everything(model, optimizer)
    with pytest.raises(UserError, match=r"rho\(0\).*-1"):
        Step(model, optimizer, _schedule_that_turns(-1.0), features=mlp)(batch())
    assert same(before, everything(model, optimizer))


def _schedule_that_turns(value):
    asked = []
    return SAM(lambda step: value if asked else asked.append(step) or 0.1)


# --- non-finite values ------------------------------------------------------------------------------------------------


@each_method
def test_non_finite_base_pass_skips_the_update(method):
    model = Weights(float32())
    optimizer = adamw(model, moments(float32()))
    step = Step(model, optimizer, method, features=mlp, clip_norm=1.0)
    before, bad = everything(model, optimizer), batch()
    bad["x"][3, 2] = float("inf")
    step(bad)
    assert same(before, everything(model, optimizer))
    assert step.info.skipped
    assert (step.steps, step.skipped_steps) == (0, 1)
    step(batch())
    assert not same(before, everything(model, optimizer))
    assert (step.steps, step.skipped_steps) == (1, 1)


@perturbed
def test_non_finite_second_pass_skips_the_update(kind):
    model = Weights(float32())
    optimizer = adamw(model, moments(float32()))
    theta = model["a"].detach().clone()

    def features(model, batch):
        out = mlp(model, batch)
        moved = not torch.equal(model["a"].detach(), theta)
        return LinearHead(out.hidden * (float("inf") if moved else 1), out.weight, out.labels)

    before = everything(model, optimizer)
    step = Step(model, optimizer, kind(0.5), features=features)
    loss = step(batch())
    assert torch.isfinite(loss)
    assert np.isfinite(step.info.base_norm)
    assert step.info.skipped
    assert same(before, everything(model, optimizer))


# --- clipping and the optimizer ---------------------------------------------------------------------------------------


@each_method
def test_final_gradient_is_clipped_once_as_by_torch(method):
    model = Weights(float32())
    optimizer = adamw(model, moments(float32()))
    Step(model, optimizer, method, features=mlp, clip_norm=0.05).gradient(batch(), clip=True)
    clipped = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in clipped]).norm()
    assert norm == pytest.approx(0.05, rel=1e-5)
    if method.path != "base" and method.precondition:
        return  # clipping turns the direction as well, so there is no unclipped twin
    Step(model, optimizer, method, features=mlp).gradient(batch())
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    for mine, p in zip(clipped, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=2e-5, atol=0)


def test_plain_is_the_ordinary_training_loop():
    models = Weights(float32()), Weights(float32())
    optimizers = [adamw(m, lr=1e-2) for m in models]
    step = Step(models[0], optimizers[0], Plain(), features=mlp, clip_norm=0.1)
    for seed in range(4):
        out = mlp(models[1], batch(seed))
        loss = F.cross_entropy(out.hidden @ out.weight.T, out.labels, ignore_index=-1)
        optimizers[1].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
        optimizers[1].step()
        torch.testing.assert_close(step(batch(seed)), loss.detach())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_optimizer_checkpoint_loads_without_fsam():
    model = Weights(float32())
    optimizer = adamw(model)
    step = Step(model, optimizer, METHODS["precond-functional"], features=mlp)
    for seed in range(3):
        step(batch(seed))
    other = Weights(float32())
    other.load_state_dict(model.state_dict())
    plain = adamw(other)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(everything(model, optimizer), everything(other, plain))
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in plain.state.values())
    assert int(next(iter(plain.state.values()))["step"]) == step.steps == 3


def test_resumed_step_equals_an_uninterrupted_one():
    def run(steps, model, optimizer, state=None):
        step = Step(model, optimizer, FunctionalSAM(lambda n: 0.1 * n, precondition="adam"), features=mlp)
        if state is not None:
            step.load_state_dict(state)
        for seed in steps:
            step(batch(seed))
        return step

    whole = Weights(float32())
    whole_optimizer = adamw(whole)
    run(range(4), whole, whole_optimizer)
    first, second = Weights(float32()), Weights(float32())
    optimizers = adamw(first), adamw(second)
    step = run(range(2), first, optimizers[0])
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    run(range(2, 4), second, optimizers[1], step.state_dict())
    assert same(everything(whole, whole_optimizer), everything(second, optimizers[1]))


def test_each_group_is_preconditioned_by_its_betas_and_eps():
    def direction(groups) -> dict[str, torch.Tensor]:
        model = Weights(float32())
        optimizer = torch.optim.AdamW([{"params": [model[k]], **o} for k, o in groups.items()])
        for k in groups:
            nu = torch.from_numpy(moments(float32())[k])
            optimizer.state[model[k]] = {"step": torch.tensor(3.0), "exp_avg": 0 * nu, "exp_avg_sq": nu}
        seen = {}

        def features(model, batch):
            seen.update({k: model[k].detach().clone() for k in groups})
            return mlp(model, batch)

        Step(model, optimizer, FunctionalSAM(0.5, precondition="adam"), features=features).gradient(batch())
        return {k: x - model[k].detach() for k, x in seen.items()}

    one, other = {"betas": (0.9, 0.5), "eps": 1e-3}, {"betas": (0.9, 0.99), "eps": 1e-8}
    mixed, first, second = (
        direction({"a": one, "w": other}),
        direction({"a": one, "w": one}),
        direction({"a": other, "w": other}),
    )
    cosine = lambda x, y: F.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    assert cosine(mixed["a"], first["a"]) == pytest.approx(1, abs=1e-6)
    assert cosine(mixed["w"], second["w"]) == pytest.approx(1, abs=1e-6)
    assert cosine(mixed["a"], second["a"]) < 0.999


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adamax])
def test_optimizer_without_second_moments_is_refused(optimizer):
    model = Weights(float32())
    with pytest.raises(UserError, match=optimizer.__name__):
        Step(model, optimizer(model.parameters(), lr=0.1), SAM(0.1, precondition="adam"), features=mlp)


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan")])
def test_bad_clip_norm_is_refused(clip_norm):
    model = Weights(float32())
    with pytest.raises(UserError, match="clip_norm.*got " + str(clip_norm)):
        Step(model, adamw(model), Plain(), features=mlp, clip_norm=clip_norm)


# --- what a step costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "calls"), [(Plain(), 1), (SAM(0.1), 2), (FunctionalSAM(0.1), 2)])
def test_features_is_called_once_a_pass(method, calls):
    model, seen = Weights(float32()), []
    features = lambda model, batch: seen.append(None) or mlp(model, batch)
    Step(model, adamw(model), method, features=features)(MicroBatches([batch(1), batch(2)]))
    assert len(seen) == 2 * calls


class Products(TorchDispatchMode):
    """Every product whose result has V columns, as the storages that went in."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__ and isinstance(out, torch.Tensor) and out.shape[-1] == self.vocabulary:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.found.append({x.untyped_storage().data_ptr() for x in tensors})
        return out


def products_of(method, memory=AUTO) -> tuple[int, int]:
    """(products with V columns in a step, those among them that read the perturbed hidden states or head)."""
    model, heads = Weights(float32()), []
    weights = []
    storage = lambda x: x.untyped_storage().data_ptr()

    def recording(model, batch):
        heads.append(mlp(model, batch))
        weights.append({storage(heads[-1].hidden), storage(heads[-1].weight)})
        return heads[-1]

    step = Step(model, adamw(model), method, features=recording, memory=memory)
    with Products(9) as products:
        step.gradient(batch())
    theta = {storage(p) for p in model.parameters()}
    moved = weights[1] - theta if len(weights) > 1 else set()
    return len(products.found), sum(bool(inputs & moved) for inputs in products.found)


def test_second_pass_of_functional_sam_forms_no_logits():
    assert products_of(Plain()) == (1, 0)
    assert products_of(FunctionalSAM(0.3)) == (1, 0)
    assert products_of(FunctionalSAM(0.3), Memory("recompute")) == (2, 0)
    assert products_of(SAM(0.3)) == (2, 1)


def test_outer_autocast_sees_the_perturbed_weights():
    """Autocast caches its casts of the weights: the second pass must not be given θ's."""
    model = Weights(float32())
    step = Step(model, adamw(model), SAM(2.0), features=mlp)
    with torch.autocast("cpu", torch.bfloat16):
        step.gradient(batch())
    outside = Step(model, adamw(model), SAM(2.0), features=mlp)
    outside.gradient(batch())
    assert step.info.perturbed_loss == pytest.approx(outside.info.perturbed_loss, rel=0.02)
    assert outside.info.perturbed_loss > 1.1 * outside.info.loss


def test_returned_loss_has_no_graph():
    model = Weights(float32())
    for method in METHODS.values():
        assert not Step(model, adamw(model), method, features=mlp)(batch()).requires_grad


def test_rho_schedule_counts_steps_that_were_taken():
    model, asked = Weights(float32()), []
    step = Step(model, adamw(model), SAM(lambda n: asked.append(n) or 0.1), features=mlp)
    bad = {**batch(), "x": batch()["x"] * float("nan")}
    asked.clear()
    for b in (batch(1), bad, batch(2), batch(3)):
        step(b)
    assert asked == [0, 1, 1, 2]


def test_settings_of_the_helper_are_the_optimizers():
    group = adamw(Weights(float32())).param_groups[0]
    assert (group["betas"][1], group["eps"]) == (B2, EPS)
