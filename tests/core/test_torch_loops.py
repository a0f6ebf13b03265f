"""The step in PyTorch loops of others: kinds of batches, the host's own update, grad modes, buffers, optimizers."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from fsam_core.torch import (
    SAM,
    AdamW,
    FunctionalSAM,
    LinearHead,
    LogitSAM,
    MicroBatches,
    Plain,
    Schedule,
    Staged,
    Step,
    UserError,
)

D, V, RHO = 6, 11, 0.3
METHODS = {"plain": Plain(), "sam": SAM(RHO), "functional": FunctionalSAM(RHO), "logit": LogitSAM(RHO)}


class Model(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D, sparse=sparse)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.double()

    def trunk(self, x):
        return torch.tanh(self.mix(self.embedding(x)))


def features(model, batch):
    x, y = batch
    return LinearHead(model.trunk(x), model.head.weight, y)


def batch_of(seed: int = 0, rows: int = 8):
    return list(torch.randint(0, V, (2, rows, 3), generator=torch.Generator().manual_seed(seed)).unbind())


def made(method=None, of=features, model=None, **options):
    model = model or Model()
    return model, Step(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), method or FunctionalSAM(RHO), features=of, **options
    )


def expected():
    """Hand-written Functional-SAM for `features` on one batch."""
    x, y = batch_of()
    outputs = lambda model, batch: [model.trunk(batch[0]) @ model.head.weight.T]
    loss = lambda z: F.cross_entropy(z[0].flatten(0, 1), y.flatten())
    return reference.functional(Model(), [(x, y)], outputs, loss, RHO)


# --- a batch is what the loader gives ---------------------------------------------------------------------------------


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "pair"


Named = namedtuple("Named", "x y")
KINDS = {
    "list": (list, lambda b: b),
    "tuple": (tuple, lambda b: b),
    "named tuple": (lambda b: Named(*b), lambda b: b),
    "dict": (lambda b: dict(zip("xy", b, strict=True)), lambda b: (b["x"], b["y"])),
    "UserDict": (lambda b: UserDict(zip("xy", b, strict=True)), lambda b: (b["x"], b["y"])),
    "BatchEncoding": (lambda b: BatchEncoding(dict(zip("xy", b, strict=True))), lambda b: (b.x, b.y)),
    "dataclass": (lambda b: Pair(*b), lambda b: (b.x, b.y)),
    "nested": (lambda b: [{"x": b[0]}, (b[1], None, 3.0, "text")], lambda b: (b[0]["x"], b[1][0])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_is_one_batch(kind):
    """Two rows, so that a list [x, y] could be read as two micro-batches of x's and y's shapes."""
    wrap, unwrap = KINDS[kind]
    of = lambda model, batch: features(model, unwrap(batch))
    for method in (
        FunctionalSAM(RHO),
        FunctionalSAM(RHO, fraction=0.25),
        FunctionalSAM(RHO, ascent="part", ascent_fraction=0.5),
    ):
        model, step = made(method, of)
        step.gradient(wrap(batch_of()))
        plain, one = made(method)
        one.gradient(tuple(batch_of()))
        assert reference.off_by(model, {k: p.grad for k, p in plain.named_parameters()}) == 0
    model, step = made(of=of)
    step.gradient(wrap(batch_of()))
    assert reference.off_by(model, expected()) < 1e-12


def test_default_collate_trains():
    x = torch.randint(0, V, (64, 3), generator=torch.Generator().manual_seed(1))
    _, step = made(FunctionalSAM(0.05))
    loader = DataLoader(TensorDataset(x, x), batch_size=2)
    first, *_, last = [float(step(batch)) for _ in range(12) for batch in loader]
    assert last < 0.1 * first


def test_what_cannot_be_cut_is_refused():
    _, step = made(FunctionalSAM(RHO, fraction=0.5), lambda model, batch: features(model, batch[:2]))
    with pytest.raises(UserError, match="fraction: a batch holds a Generator"):
        step([*batch_of(), torch.Generator()])
    with pytest.raises(UserError, match="MicroBatches: got no micro-batch"):
        MicroBatches([])


# --- the host's loop --------------------------------------------------------------------------------------------------


def test_gradient_counts_the_step():
    """Schedules, ρ(n) and random ascents go on in a loop that calls optimizer.step() itself."""
    asked = []
    model, step = made(SAM(lambda n: asked.append(n) or 0.1), schedule=Schedule(every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked.clear()
    for i in range(4):
        step.gradient(batch_of(i))
        optimizer.step()
        optimizer.zero_grad()
    assert (step.steps, asked) == (4, [0, 2])
    ascents = []
    for _ in range(2):
        _, random = made(FunctionalSAM(RHO, ascent="random"))
        for _ in range(2):
            random.gradient(batch_of())
            ascents.append(random.info.grad_norm)
    assert ascents[0] == ascents[2] != ascents[1] == ascents[3]


def test_five_lines_of_the_host_are_one_step():
    one, step = made(clip_norm=0.1)
    step(batch_of())
    model, half = made(clip_norm=0.1)
    half.gradient(batch_of())
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    half.optimizer.step()
    for p, q in zip(one.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_gradient_is_clipped_where_asked():
    model, step = made(clip_norm=0.01)
    norm = lambda: torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    step.gradient(batch_of())
    assert norm() == pytest.approx(step.info.grad_norm)
    step.gradient(batch_of(), clip=True)
    assert norm() == pytest.approx(0.01)


def test_old_gradient_is_replaced_or_added_to():
    model, step = made()
    step.gradient(batch_of(1))
    first = {k: p.grad.clone() for k, p in model.named_parameters()}
    step.gradient(batch_of())
    assert reference.off_by(model, expected()) < 1e-12
    second = {k: p.grad.clone() for k, p in model.named_parameters()}
    step.gradient(batch_of(1), keep_grad=True)
    assert reference.off_by(model, {k: first[k] + second[k] for k in first}) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_optimizer_after_a_skipped_step_changes_nothing(method):
    model, step = made(METHODS[method], lambda model, batch: features(model, (batch[0], batch[1])))
    step(batch_of())
    before = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()))
    broken = lambda model, batch: LinearHead(model.trunk(batch[0]) * torch.nan, model.head.weight, batch[1])
    step.features = broken
    step.gradient(batch_of())
    assert step.info.skipped
    assert (step.steps, step.skipped_steps) == (1, 1)
    assert all(p.grad is None for p in model.parameters())
    step.optimizer.step()
    step(batch_of())
    assert all(p.grad is None for p in model.parameters())
    for x, y in zip(before[0].values(), model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert str(before[1]) == str(step.optimizer.state_dict())


def test_kept_gradient_survives_a_step_that_is_skipped_or_raises():
    model, step = made()
    step.gradient(batch_of())
    before = {k: p.grad.clone() for k, p in model.named_parameters()}
    step.features = lambda model, batch: LinearHead(model.trunk(batch[0]) * torch.nan, model.head.weight, batch[1])
    step.gradient(batch_of(), keep_grad=True)
    assert step.info.skipped
    assert reference.off_by(model, before) == 0
    step.features = lambda model, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step.gradient(batch_of(), keep_grad=True)
    assert reference.off_by(model, before) == 0


# --- grad mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_a_step_switches_gradients_on(mode):
    model, step = made()
    with mode():
        step.gradient(batch_of())
        assert not torch.is_grad_enabled()
    assert reference.off_by(model, expected()) < 1e-12


def test_inference_mode_is_refused():
    _, step = made()
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        step(batch_of())


# --- buffers ----------------------------------------------------------------------------------------------------------


class Counting(Model):
    """Buffers that a forward pass writes in every way there is, and that it computes with."""

    def __init__(self, rest: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(D, dtype=torch.float64))
        self.register_buffer("constant", torch.ones(D, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(D).double()

    def trunk(self, x):
        h = super().trunk(x)
        h = h - self.mean + 0.1 * self.replaced + 0.01 * self.count * self.constant
        with torch.no_grad():
            self.mean.data.mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
            self.count += 1
            self.replaced = self.replaced + h.detach().std((0, 1))
        return self.norm(h.flatten(0, 1)).view_as(h)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("method", ["sam", "functional", "logit"])
@pytest.mark.parametrize("staged", [False, True])
def test_buffers_are_those_of_one_forward_pass(method, micro, staged):
    """Both passes see the same buffers: with ρ = 0 their gradients are the plain ones."""
    batches = MicroBatches(batch_of(i) for i in range(micro))
    of = Staged(lambda model, b: model.trunk(b[0]), lambda model, h, b: LinearHead(h, model.head.weight, b[1]))
    kind = type(METHODS[method])
    still, moved, plain = (
        made(m, of if staged else features, Counting())
        for m in (kind(0.0), kind(RHO, scope=(lambda name: "head" in name) if staged else "all"), Plain())
    )
    for _ in range(3):
        for _, step in (still, moved, plain):
            step.gradient(batches)
        assert reference.off_by(still[0], {k: p.grad for k, p in plain[0].named_parameters()}) < 1e-12
        for name, buffer in plain[0].named_buffers():
            torch.testing.assert_close(dict(still[0].named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dict(moved[0].named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)
    assert moved[0].count == 3 * micro


def test_only_buffers_that_change_are_copied():
    _, step = made(model=Counting())
    step(batch_of())
    step(batch_of())
    names = {name for _, name in step._replay.state().buffers}
    assert names == {"mean", "count", "replaced", "running_mean", "running_var", "num_batches_tracked"}
    _, step = made()
    step(batch_of())
    assert not step._replay.state().buffers


def test_unseen_micro_batches_write_their_buffers():
    """An exact SAM along a part's ascent sees the rest in the second pass only."""
    batches = MicroBatches(batch_of(i) for i in range(4))
    model, step = made(SAM(1e-9, ascent="part", ascent_fraction=0.5), model=Counting())
    plain, other = made(Plain(), model=Counting())
    step.gradient(batches), other.gradient(batches)
    assert model.count == plain.count == 4
    for (name, x), y in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=name)


# --- optimizers -------------------------------------------------------------------------------------------------------


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


def test_a_copied_step_is_a_step_of_its_own():
    model, step = made(FunctionalSAM(RHO, precondition="adam", scope=lambda name: "mix" in name, ascent="previous"))
    step(batch_of())
    other = copy.deepcopy(step)
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
