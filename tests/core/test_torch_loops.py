"""The step in PyTorch loops of others: kinds of batches, the host's own update, grad modes, buffers."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import reference
import torch
from loop_model import METHODS, RHO, D, Model, V, batch_of, features, made
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from fsam_core.torch import (
    SAM,
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


def expected():
    """Hand-written Functional-SAM for `features` on one batch."""
    x, y = batch_of()
    outputs = lambda model, batch: [model.trunk(batch[0]) @ model.head.weight.T]
    loss = lambda z: F.cross_entropy(z[0].flatten(0, 1), y.flatten())
    return reference.functional(Model(), [(x, y)], outputs, loss, RHO)


# --- a batch that features change -------------------------------------------------------------------------------------


def test_features_may_take_items_out_of_a_batch():
    model, step = made(of=lambda model, batch: features(model, (batch.pop("x"), batch["labels"].pop())))
    x, y = batch_of()
    given = {"x": x, "labels": [y]}
    step.gradient(given)
    assert list(given) == ["x", "labels"]
    assert given["labels"] == [y]
    assert reference.off_by(model, expected()) < 1e-12
    in_a_tuple, step = made(of=lambda model, batch: features(model, (batch[0].pop("x"), batch[1])))
    step.gradient(({"x": x}, y))
    assert reference.off_by(in_a_tuple, expected()) < 1e-12


def test_features_that_write_to_a_batch_in_place_are_refused():
    of = lambda model, batch: features(model, (batch[0].remainder_(3), batch[1]))
    _, step = made(of=of)
    with pytest.raises(UserError, match=r"features: it writes to a tensor of the batch in place, .* clone it first"):
        step(batch_of())
    made(Plain(), of=of)[1](batch_of())  # which needs it once


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


# --- weights that are converted ---------------------------------------------------------------------------------------


def test_model_may_be_converted_between_two_steps():
    model, step = made()
    step(batch_of())
    model.float()
    fresh = copy.deepcopy(model)
    step.gradient(batch_of())
    made(model=fresh)[1].gradient(batch_of())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


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


def test_weights_that_are_cached_are_refused():
    """A cached weight would be θ's in the pass at θ + ε too, or have no graph."""
    model = Model()
    parametrizations.weight_norm(model.mix)
    _, step = made(FunctionalSAM(RHO, ascent="random"), model=model)
    with parametrize.cached(), pytest.raises(UserError, match=r"parametrize.cached\(\) would keep those of the first"):
        step(batch_of())
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


@pytest.mark.parametrize("kind", [SAM, LogitSAM])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_buffers_move_once_along_the_ascent_of_a_part(kind, strength):
    """An exact SAM sees the rest in the second pass only; at another strength it has seen it before."""
    batches = MicroBatches(batch_of(i) for i in range(4))
    model, step = made(kind(1e-9, ascent="part", ascent_fraction=0.5, strength=strength), model=Counting())
    plain, other = made(Plain(), model=Counting())
    step.gradient(batches), other.gradient(batches)
    assert model.count == plain.count == 4
    for (name, x), y in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("as_buffer", [False, True])
def test_teacher_that_the_forward_pass_writes_is_a_buffer_or_refused(as_buffer):
    class Teaching(Model):
        """A momentum encoder that moves in the forward pass, as in MoCo."""

        def __init__(self) -> None:
            super().__init__()
            teacher = self.mix.weight.detach().clone()
            if as_buffer:
                self.register_buffer("teacher", teacher)
            else:
                self.teacher = nn.Parameter(teacher, requires_grad=False)

        def trunk(self, x):
            self.teacher.data = 0.9 * self.teacher.data + 0.1 * self.mix.weight.data
            return super().trunk(x) @ self.teacher

    model = Teaching()
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), SAM(RHO), features=features)
    if not as_buffer:
        with pytest.raises(UserError, match="forward pass writes teacher, a parameter that is not trained"):
            step(batch_of())
        return
    for i in range(3):
        before = model.teacher.clone(), model.mix.weight.detach().clone()
        step(batch_of(i))
        assert torch.allclose(model.teacher, 0.9 * before[0] + 0.1 * before[1], atol=1e-15)
