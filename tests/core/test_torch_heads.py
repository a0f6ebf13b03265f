"""What a PyTorch model may return, against hand-written autograd: several heads, trees of outputs, counts, labels."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from fsam_core.torch import (
    FunctionalSAM,
    Heads,
    LinearHead,
    Logits,
    MicroBatches,
    Outputs,
    Plain,
    Step,
    UserError,
    heads,
    mean_loss,
)

RHO, D, V, EXPERTS = 0.3, 6, 11, 4
TOLERANCE = 1e-12


class Model(nn.Module):
    """Two prediction heads that share a trunk, one of them tied to the embedding, and a router."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.mix, self.router = nn.Linear(D, D), nn.Linear(D, EXPERTS)
        self.second = nn.Linear(D, V)
        self.double()

    def trunk(self, batch):
        return torch.tanh(self.mix(self.embedding(batch["x"]).cumsum(1)))


def batch_of(seed: int = 0, rows: int = 4, length: int = 5) -> dict:
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, V, (2, rows, length), generator=random).unbind()
    return {"x": x, "y": y.masked_fill(torch.rand(rows, length, generator=random) < 0.3, -1)}


def balance(router_logits):
    """A router's load-balancing loss: quadratic in the mean probability of each expert."""
    return EXPERTS * router_logits.softmax(-1).flatten(0, -2).mean(0).square().sum()


def two_heads(model, batch):
    h = model.trunk(batch)
    return Heads(
        [
            LinearHead(h, model.embedding.weight, batch["y"]),
            LinearHead(h, model.second.weight, batch["y"].roll(-1, 1), bias=model.second.bias),
            Outputs({"router": (model.router(h), batch["x"])}, lambda given: balance(given["router"][0])),
        ],
        weights=[1.0, 0.5, 0.1],
    )


def three_outputs(model, batch):
    h = model.trunk(batch)
    return h @ model.embedding.weight.T, model.second(h), model.router(h)


def mean(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1)


def sums(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")


def gradient(features, batch, method=None, model=None):
    model = model or Model()
    step = Step(model, torch.optim.SGD(model.parameters()), method or FunctionalSAM(RHO), features=features)
    loss = step.gradient(batch)
    return model, step, loss


@pytest.mark.parametrize("cut", ["logits", "hidden"])
def test_heads_are_a_weighted_sum_of_losses(cut):
    batch = batch_of()
    of = lambda z: mean(z[0], batch["y"]) + 0.5 * mean(z[1], batch["y"].roll(-1, 1)) + 0.1 * balance(z[2])
    model, step, loss = gradient(two_heads, batch, FunctionalSAM(RHO, cut=cut))
    assert loss.item() == pytest.approx(of(three_outputs(Model(), batch)).item(), rel=1e-12)
    error = reference.off_by(model, reference.functional(Model(), [batch], three_outputs, of, RHO))
    assert error < TOLERANCE if cut == "logits" else 1e-4 < error < 1  # the hidden cut is another method
    assert step.info.weight == (batch["y"] >= 0).sum()
    assert mean_loss(two_heads)(Model(), batch).item() == pytest.approx(loss.item(), rel=1e-12)


def test_hidden_cut_of_two_heads_holds_hidden_cotangents():
    """The head's gradients are those at θ, the trunk's come from h̄(θ) through the Jacobian at θ+ε."""
    batch, model = batch_of(), Model()

    def hidden_of(model, batch):
        return model.trunk(batch), model.router(model.trunk(batch))

    w, s, b = (x.detach() for x in (model.embedding.weight, model.second.weight, model.second.bias))
    of = lambda z: (
        mean(z[0] @ w.T, batch["y"]) + 0.5 * mean(z[0] @ s.T + b, batch["y"].roll(-1, 1)) + 0.1 * balance(z[1])
    )
    model, step, _ = gradient(
        two_heads, batch, FunctionalSAM(RHO, cut="hidden", scope=lambda name: "second" not in name)
    )
    plain = gradient(two_heads, batch, Plain())[0]
    torch.testing.assert_close(model.second.weight.grad, plain.second.weight.grad, rtol=1e-12, atol=0)
    assert not torch.allclose(model.mix.weight.grad, plain.mix.weight.grad, rtol=1e-3)
    assert step.info.skipped is False
    assert of(hidden_of(Model(), batch)).item() == pytest.approx(step.info.loss, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "logits", "outputs", "heads"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_unequal_micro_batches_are_token_means(kind, fraction):
    batches = [batch_of(1, 2), batch_of(2, 6)]
    count = lambda batch: (batch["y"] >= 0).sum()

    def features(model, batch):
        h, y = model.trunk(batch), batch["y"]
        linear = LinearHead(h, model.embedding.weight, y)
        z = h @ model.embedding.weight.T
        return {
            "linear": linear,
            "logits": Logits(z, lambda z: mean(z, y), count(batch)),
            "outputs": Outputs([z], lambda given: mean(given[0], y), count(batch)),
            "heads": Heads([linear, Logits(model.second(h), lambda z: mean(z, y), count(batch))]),
        }[kind]

    def outputs(model, batch):
        h = model.trunk(batch)
        return (h @ model.embedding.weight.T, *([model.second(h)] if kind == "heads" else []))

    total = sum(map(count, batches))
    of = lambda *every: sum(sums(z, b["y"]) for zs, b in zip(every, batches, strict=True) for z in zs) / total
    method = Plain() if fraction < 1 else FunctionalSAM(RHO)
    expected = reference.functional(Model(), batches, outputs, of, 0.0 if fraction < 1 else RHO)
    model, step, _ = gradient(features, MicroBatches(batches), method)
    assert reference.off_by(model, expected) < TOLERANCE
    if fraction < 1:  # with ρ = 0 the correction of a part is nothing
        same, step, _ = gradient(features, MicroBatches(batches), FunctionalSAM(0.0, fraction=fraction))
        assert reference.off_by(same, expected) < TOLERANCE
    assert step.info.weight == total


def test_heads_of_one_tensor_share_its_gradient():
    """Both heads have the same weight and the same hidden states: products add to one array."""
    batch = batch_of()

    def features(model, batch):
        h = model.trunk(batch)
        return Heads([LinearHead(h, model.embedding.weight, y) for y in (batch["y"], batch["x"])], [1.0, 0.25])

    one = lambda model, batch: [model.trunk(batch) @ model.embedding.weight.T]
    of = lambda z: mean(z[0], batch["y"]) + 0.25 * mean(z[0], batch["x"])
    model, _, _ = gradient(features, batch)
    assert reference.off_by(model, reference.functional(Model(), [batch], one, of, RHO)) < TOLERANCE


# --- what is no loss of the outputs alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [lambda z: z.div_(0.7), lambda z: z[..., 0].fill_(-1e9)])
def test_loss_that_writes_to_its_outputs_is_refused(write):
    def written(z, batch):
        write(z)
        return mean(z, batch["y"])

    def cooled(model, batch):
        return Logits(model.trunk(batch) @ model.embedding.weight.T, lambda z: written(z, batch))

    with pytest.raises(UserError, match=r"loss writes to the outputs in place, .* write to z.clone\(\)"):
        gradient(cooled, batch_of())


def test_loss_that_reaches_more_is_refused_by_name():
    def decayed(model, batch):
        z = model.trunk(batch) @ model.embedding.weight.T
        return Logits(z, lambda z: mean(z, batch["y"]) + model.mix.weight.square().sum())

    with pytest.raises(UserError, match=r"loss reaches mix.weight besides the outputs"):
        gradient(decayed, batch_of())

    def through_a_closure(model, batch):
        h = model.trunk(batch)
        return Outputs(model.router(h), lambda z: balance(z) + h.square().mean())

    with pytest.raises(UserError, match=r"loss reaches .* and 2 more besides the outputs"):
        gradient(through_a_closure, batch_of())
    with pytest.raises(UserError, match="besides the outputs"):
        mean_loss(decayed)(Model(), batch_of())


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (
            lambda m, h, b: LinearHead(h, m.second.weight, b["y"], h.detach().sum(-1) * m.mix.bias.sum()),
            "token_weights",
        ),
        (lambda m, h, b: LinearHead(h, m.second.weight, b["y"], count=m.mix.bias.sum()), "count"),
        (lambda m, h, b: Logits(m.second(h), lambda z: z.mean(), m.mix.bias.sum()), "Logits: weight"),
        (lambda m, h, b: Heads([LinearHead(h, m.second.weight, b["y"])], [m.mix.bias.sum()]), "Heads: weights"),
        (lambda m, h, b: Logits(m.second(h), lambda z: torch.ones(())), "does not depend on the outputs"),
        (lambda m, h, b: Logits(m.second(h), lambda z: z.sum(-1)), r"must return a scalar tensor, got \(4, 5\)"),
        (lambda m, h, b: Outputs({"x": b["x"]}, lambda given: given["x"].sum()), "no floating tensor"),
        (lambda m, h, b: Heads([]), "at least one"),
        (lambda m, h, b: Heads([LinearHead(h, m.second.weight, b["y"])], [1.0, 2.0]), "one number a head, got 2 for 1"),
        (lambda m, h, b: LinearHead(h, m.second.weight, b["y"].float()), "labels must be integers"),
        (lambda m, h, b: h, "got Tensor"),
    ],
)
def test_heads_that_cannot_be_right_are_refused(head, match):
    with pytest.raises(UserError, match=match):
        gradient(lambda model, batch: head(model, model.trunk(batch), batch), batch_of())


# --- labels and counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_labels_of_narrow_integers_are_labels(dtype):
    batch = batch_of()
    of = lambda model, b: LinearHead(model.trunk(b), model.second.weight, b["y"])
    wide, narrow = (gradient(of, {**batch, "y": batch["y"].to(kind)})[0] for kind in (torch.int64, dtype))
    assert reference.off_by(narrow, {k: p.grad for k, p in wide.named_parameters() if p.grad is not None}) == 0


def test_label_beyond_the_vocabulary_is_refused_by_value():
    batch = batch_of()
    batch["y"][2, 3] = V + 6
    of = lambda model, b: LinearHead(model.trunk(b), model.second.weight, b["y"])
    with pytest.raises(UserError, match=f"labels must be below V = {V}, or negative to be ignored; got {V + 6}"):
        gradient(of, batch)
    # Where the host does not wait for the device, the loss is NaN.
    (flat,) = heads.flat(of(Model(), batch), "later")
    assert flat.token_weights.isnan().all()
    assert flat.labels.max() < V


def test_count_divides_weights_that_have_no_mean():
    """Advantages of either sign, as in reinforcement learning."""
    batch = batch_of()
    advantages = torch.linspace(-2, 1, batch["y"].numel(), dtype=torch.float64).view_as(batch["y"])
    of = lambda model, b: LinearHead(model.trunk(b), model.second.weight, b["y"], advantages, count=b["y"].numel())
    outputs = lambda model, b: [model.trunk(b) @ model.second.weight.T]

    def loss(z):
        each = F.cross_entropy(z[0].flatten(0, 1), batch["y"].flatten(), ignore_index=-1, reduction="none")
        return (each * advantages.flatten()).sum() / each.numel()

    model, step, _ = gradient(of, batch)
    assert reference.off_by(model, reference.functional(Model(), [batch], outputs, loss, RHO)) < TOLERANCE
    assert step.info.weight == batch["y"].numel()
    without = lambda model, b: LinearHead(model.trunk(b), model.second.weight, b["y"], advantages)
    with pytest.raises(UserError, match=r"needs a count > 0, got -.*give LinearHead\(count="):
        gradient(without, batch)


def test_batch_without_targets_is_no_error():
    batch = {**batch_of(), "y": torch.full((4, 5), -1)}
    _, step, loss = gradient(lambda model, b: LinearHead(model.trunk(b), model.second.weight, b["y"]), batch)
    assert loss == 0
    assert not step.info.skipped
