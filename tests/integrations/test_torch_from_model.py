"""`from_model`: the whole model is called, and the head's input is captured in front of the product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fsam_core.errors import UserError
from fsam_core.torch import FunctionalSAM, Loss, Plain, Step
from fsam_core.torch.from_model import from_model
from integrations_models import joined, llama, token_batches

BATCH = joined(token_batches())


def gradient(model, features, batch=BATCH, method=None):
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0), method or Plain(), features=features)
    loss = step.gradient(batch)
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm().clamp(min=1e-6)) for k in one)


def own(model, batch=BATCH):
    """Loss and gradient of the model's own loss."""
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


class Small(nn.Module):
    """A model of (x, y) with a head that has a bias."""

    def __init__(self, head=None):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), head or nn.Linear(8, 5)

    def forward(self, x, y=None):
        return self.head(torch.tanh(self.body(x)))


X, Y = torch.randn(7, 6), torch.tensor([0, 1, 2, 3, 4, -1, 0])


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_is_that_of_the_models_own_loss(tied):
    model = llama(tie_word_embeddings=tied)
    expected_loss, expected = own(model)
    loss, found = gradient(model, from_model(shift=True))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("labels", [1, lambda batch: batch[1]])
def test_labels_are_an_index_or_a_function_and_the_bias_is_taken(labels):
    model = Small()
    F.cross_entropy(model(X), Y, ignore_index=-1).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert distance(gradient(model, from_model("head", labels), (X, Y))[1], expected) < 1e-5


def test_shift_moves_token_weights_with_their_labels():
    batch = {**BATCH, "weights": torch.rand(BATCH["labels"].shape)}
    head = from_model(shift=True, token_weights="weights")(llama(), batch)
    assert torch.equal(head.labels[:, :-1], batch["labels"][:, 1:])
    assert (head.labels[:, -1] < 0).all()
    assert torch.equal(head.token_weights[:, :-1], batch["weights"][:, 1:])


def test_count_and_options_of_the_loss_reach_the_head():
    head = from_model("head", 1, loss=Loss(z_loss=1e-4), ignore_index=0, count=lambda batch: len(batch[0]))(
        Small(), (X, Y)
    )
    assert (head.loss.z_loss, head.ignore_index, head.count) == (1e-4, 0, len(X))


def test_product_of_the_head_is_not_computed():
    model, seen = Small(), []
    model.head.register_forward_hook(lambda *_: seen.append("after"))
    model.head.register_forward_pre_hook(lambda *_: seen.append("before"))
    from_model("head", 1)(model, (X, Y))
    assert seen == ["before"]
    assert "forward" not in model.head.__dict__
    assert model(X).shape == (7, 5)


def test_model_that_raises_is_left_as_it_was():
    model = Small()
    with pytest.raises(RuntimeError):
        from_model("head", 1)(model, (X[:, :3], Y))
    assert "forward" not in model.head.__dict__


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_model_is_captured_also_if_it_was_called_before(called_before, in_place):
    torch._dynamo.reset()
    model = Small()
    expected = gradient(model, from_model("head", 1), (X, Y))[1]
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    if called_before:
        compiled(X, Y)
    found = gradient(compiled, from_model("head", 1), (X, Y), FunctionalSAM(rho=1e-9))[1]
    assert distance({name.removeprefix("_orig_mod."): x for name, x in found.items()}, expected) < 1e-5
    assert torch.equal(compiled(X, Y), model.head(torch.tanh(model.body(X))))  # and evaluation has its head again


def test_captured_input_has_the_dtype_of_an_autocast_around_forward():
    model = Small()
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    head = from_model("head", 1)(model, (X, Y))
    assert head.hidden.dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32


def test_float32_input_of_the_head_is_cast_as_autocast_would():
    class Wide(Small):
        def forward(self, x, y=None):
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.body(x).float())

    assert from_model("head", 1)(Wide(), (X, Y)).hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_layers_give_the_same_gradient(reentrant):
    model = llama().train()
    expected = gradient(model, from_model(shift=True), method=FunctionalSAM(rho=0.1))[1]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert distance(gradient(model, from_model(shift=True), method=FunctionalSAM(rho=0.1))[1], expected) < 1e-5


def test_parametrized_head_is_a_linear_layer():
    model = Small()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    F.cross_entropy(model(X), Y, ignore_index=-1).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert distance(gradient(model, from_model("head", 1), (X, Y))[1], expected) < 1e-5


def test_head_is_found_behind_wrappers():
    wrapped = nn.ModuleDict({"module": Small()})
    head = from_model("head", 1, call=lambda model, batch: model["module"](batch[0]))(wrapped, (X, Y))
    assert head.weight is wrapped["module"].head.weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WeightOnly(Small):
    def forward(self, x, y=None):
        return torch.tanh(self.body(x)) @ self.head.weight.T


REFUSED = {
    "absent": (Small(), "top", "no module has the name 'top'.*'body'"),
    "ambiguous": (nn.ModuleList([Small(), Small()]), "head", r"any of 0\.head, 1\.head"),
    "scaled": (Small(Scaled(8, 5)), "head", "'head' is a Scaled whose forward is not"),
    "never called": (WeightOnly(), "head", "the model never calls 'head'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_head_that_cannot_be_captured_is_refused(case):
    model, name, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        from_model(name, 1)(model, (X, Y))


def test_patched_forward_of_the_head_is_refused():
    model = Small()
    plain = model.head.forward
    model.head.forward = lambda x: 3 * plain(x)
    with pytest.raises(UserError, match="not that of"):
        from_model("head", 1)(model, (X, Y))


def test_batch_without_the_labels_is_named():
    with pytest.raises(UserError, match="labels: the batch, a dict, has no 'labels'"):
        from_model()(llama(), {"input_ids": BATCH["input_ids"]})


def lora(**options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(**options))


def test_low_rank_adapter_of_the_head_is_refused():
    with pytest.raises(UserError, match=r"adapter.*target_modules.*modules_to_save"):
        from_model()(lora(target_modules=["lm_head"]), BATCH)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["frozen", "modules_to_save"])
def test_adapters_of_the_trunk_get_the_models_own_gradient(options):
    model = lora(target_modules=["q_proj", "down_proj"], **options)
    expected = own(model)[1]
    assert any("lora_B" in name for name in expected)
    assert any("lm_head" in name for name in expected) == bool(options)
    found = gradient(model, from_model(shift=True))[1]
    zero = {name for name, x in expected.items() if not x.any()}  # of the factor that is multiplied by 0
    assert distance(*({k: x for k, x in g.items() if k not in zero} for g in (found, expected))) < 1e-5


def test_head_inside_of_a_reentrant_checkpoint_is_refused():
    """Such a checkpoint runs without a graph, so that nothing below the head would get a gradient."""

    class Checkpointed(Small):
        reentrant = False

        def forward(self, x, y=None):
            end = lambda h: self.head(torch.tanh(h))
            return torch.utils.checkpoint.checkpoint(end, self.body(x), use_reentrant=self.reentrant)

    model = Checkpointed()
    features = from_model("head", 1)
    assert gradient(model, features, (X, Y))[1].keys() == dict(model.named_parameters()).keys()
    model.reentrant = True
    with pytest.raises(UserError, match=r"head: the model calls 'head' without a graph, .* use use_reentrant=False"):
        gradient(model, features, (X, Y))
