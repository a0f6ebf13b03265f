"""A step of several optimizers, of sparse gradients, of a copy, and under a GradScaler."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from loop_model import METHODS, RHO, Model, batch_of, features, made
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward

from fsam_core.torch import SAM, AdamW, FunctionalSAM, LinearHead, Logits, MicroBatches, Plain, Step, UserError


def split_optimizers(model, muon=True):
    matrices = [model.mix.weight]
    rest = [p for p in model.parameters() if all(p is not one for one in matrices)]
    first = torch.optim.Muon(matrices, lr=0.01) if muon else torch.optim.AdamW(matrices, lr=0.01)
    return [first, torch.optim.AdamW(rest, lr=0.01)]


def test_two_optimizers_are_one_step():
    one, step = made(FunctionalSAM(RHO, precondition="adam"), clip_norm=0.5)
    model = Model()
    both = Step(model, split_optimizers(model, muon=False), step.method, features=features, clip_norm=0.5)
    for i in range(3):
        assert step(batch_of(i)).item() == pytest.approx(both(batch_of(i)).item(), rel=1e-12)
    for p, q in zip(one.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_muon_needs_a_scope_with_a_preconditioner():
    model = Model().float()
    optimizers = split_optimizers(model)
    with pytest.raises(UserError, match=r"keeps exp_avg_sq \(AdamW\), got Muon for mix.weight; leave .* scope="):
        Step(model, optimizers, FunctionalSAM(RHO, precondition="adam"), features=features)
    for method in (
        FunctionalSAM(RHO),
        FunctionalSAM(RHO, precondition="adam", scope=lambda name: name != "mix.weight"),
    ):
        step = Step(model, optimizers, method, features=features)
        before = copy.deepcopy(model.state_dict())
        losses = [step(batch_of()).item() for _ in range(8)]
        assert losses[-1] < losses[0]
        assert all(not torch.equal(before[k], p) for k, p in model.state_dict().items())


def test_a_parameter_in_two_optimizers_is_refused():
    model = Model()
    twice = [torch.optim.AdamW(model.parameters()), torch.optim.SGD([model.mix.bias], lr=0.1)]
    with pytest.raises(UserError, match=r"mix\.bias is in AdamW and SGD"):
        Step(model, twice, Plain(), features=features)
    with pytest.raises(UserError, match=r"optimizer: give a torch\.optim\.Optimizer"):
        Step(model, model.parameters(), Plain(), features=features)


@pytest.mark.parametrize("method", METHODS)
def test_sparse_embeddings_take_the_step_of_dense_ones(method):
    def run(sparse):
        model = Model(sparse)
        step = Step(model, torch.optim.SGD(model.parameters(), lr=0.5), METHODS[method], features=features)
        for i in range(3):
            step(MicroBatches([batch_of(i), batch_of(i + 3)]))
        return model

    dense, sparse = run(False), run(True)
    assert sparse.embedding.weight.grad.is_sparse
    for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_sparse_adam_has_second_moments():
    model = Model(sparse=True)
    rest = [p for name, p in model.named_parameters() if "embedding" not in name]
    optimizers = [torch.optim.SparseAdam([model.embedding.weight], lr=0.05), torch.optim.AdamW(rest, lr=0.05)]
    step = Step(model, optimizers, FunctionalSAM(0.05, precondition="adam", fraction=0.5), features=features)
    losses = [step(batch_of()).item() for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def in_mix(name):
    return "mix" in name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_copied_step_is_a_step_of_its_own(copied):
    model, step = made(FunctionalSAM(RHO, precondition="adam", scope=in_mix, ascent="previous"))
    step(batch_of())
    other = copied(step)
    losses = [(step(batch_of(i)).item(), other(batch_of(i)).item()) for i in range(3)]
    assert all(x == y for x, y in losses)
    assert other.model is not model
    assert other.info == step.info
    for p, q in zip(model.parameters(), other.model.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)


def test_post_accumulate_hooks_are_refused():
    model, step = made()
    handle = model.mix.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UserError, match="1 parameters have post-accumulate-grad hooks"):
        step(batch_of())
    handle.remove()
    step(batch_of())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_optimizers_in_the_backward_pass_are_refused():
    model, step = made()
    _apply_optimizer_in_backward(torch.optim.SGD, [model.mix.weight], {"lr": 0.1})
    with pytest.raises(UserError, match="1 parameters have post-accumulate-grad hooks or optimizers"):
        step(batch_of())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", [FunctionalSAM(RHO, precondition="adam"), FunctionalSAM(RHO, ascent="momentum")])
def test_moments_that_other_ranks_have_are_refused(method):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        with pytest.raises(UserError, match="ZeroRedundancyOptimizer keeps the moments of a parameter on one rank"):
            Step(model, optimizer, method, features=features)(batch_of())
        Step(model, optimizer, FunctionalSAM(RHO), features=features)(batch_of())
    finally:
        dist.destroy_process_group()


# --- GradScaler -------------------------------------------------------------------------------------------------------


def scaled(method, scaler, **options):
    model = Model().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, Step(model, optimizer, method, features=features, scaler=scaler, **options)


@pytest.mark.parametrize("method", [*METHODS, "quarter"])
@pytest.mark.parametrize("micro", [1, 2])
def test_grad_scaler_changes_no_step(method, micro):
    method = FunctionalSAM(RHO, precondition="adam", fraction=0.25) if method == "quarter" else METHODS[method]
    batches = [MicroBatches(batch_of(10 * i + j) for j in range(micro)) for i in range(3)]
    plain, without = scaled(method, None, clip_norm=0.5)
    model, step = scaled(method, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2), clip_norm=0.5)
    for batch in batches:
        assert without(batch).item() == pytest.approx(step(batch).item(), rel=1e-5)
        assert without.info.grad_norm == pytest.approx(step.info.grad_norm, rel=1e-4)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_grad_scaler_skips_and_backs_off():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, step = scaled(FunctionalSAM(RHO), scaler)
    step(batch_of())
    before = copy.deepcopy(model.state_dict())
    good, step.features = step.features, lambda m, b: LinearHead(m.trunk(b[0]) * torch.inf, m.head.weight, b[1])
    step(batch_of())
    assert step.info.skipped
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[k], p) for k, p in model.state_dict().items())
    step.features = good
    step(batch_of())
    assert (step.steps, step.skipped_steps) == (2, 1)
    # The caller's own update.
    step.gradient(batch_of())
    scaler.unscale_(step.optimizer)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(step.info.grad_norm, rel=1e-5)
    scaler.step(step.optimizer)
    scaler.update()
    copies = {p.detach().clone().requires_grad_(): p for p in model.parameters()}
    with pytest.raises(UserError, match="scaler: masters take"):
        Step(model, AdamW(copies, copies=copies), Plain(), features=features, scaler=scaler)


@pytest.mark.parametrize("scale", [2.0**14, 2.0**16])
def test_float16_logits_have_the_gradient_of_a_plain_loop_with_a_scaler(scale):
    """Their cotangents, a millionth each, are multiplied by the scale before they are rounded to float16."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 256), torch.randn(4096, 8)
    t = (model(x) + 0.02 * torch.randn(4096, 256)).detach()

    def of(model, x):
        with torch.autocast("cpu", torch.float16):
            z = model(x)
        return Logits(z, lambda z: torch.nn.functional.mse_loss(z.float(), t))

    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=scale)
    step = Step(model, optimizer, Plain(), features=of, scaler=scaler)
    step(x)
    assert not step.info.skipped
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    head = of(model, x)
    (head.loss(head.logits) * scale).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad / scale, rtol=1e-3, atol=1e-3 * float(a.norm()))


@pytest.mark.parametrize("method", [Plain(), SAM(0.1)])
def test_an_optimizer_whose_step_does_not_fit_is_refused(method):
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="LBFGS evaluates the loss itself, by a closure"):
        Step(model, torch.optim.LBFGS(model.parameters()), method, features=lambda model, batch: None)
    with pytest.raises(UserError, match="AdamW has differentiable=True"):
        Step(model, torch.optim.AdamW(model.parameters(), differentiable=True), method, features=lambda m, b: None)


def test_what_a_step_was_made_of_is_fixed():
    _, step = made()
    for name, value in (("method", Plain()), ("optimizer", step.optimizer), ("model", step.model)):
        with pytest.raises(UserError, match=f"step.{name} is fixed; make a new Step"):
            setattr(step, name, value)
    assert copy.deepcopy(step).method == step.method


def test_maximize_is_refused():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), maximize=True)
    with pytest.raises(UserError, match=r"AdamW has maximize=True, .* return the negative loss"):
        Step(model, optimizer, FunctionalSAM(RHO), features=features)
    Step(model, optimizer, Plain(), features=features)(batch_of())
