"""`check`: a head whose loss is not the model's own is found, by loss or gradient, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fsam_core.errors import UserError
from fsam_core.torch import Heads, LinearHead, Outputs
from fsam_core.torch.check import check
from fsam_core.torch.from_model import from_model
from integrations_models import V, joined, llama, token_batches

BATCH = joined(token_batches())
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = from_model(shift=True)


def own(model, batch):
    return model(**batch).loss


def trunk(model, batch):
    """Features that a user writes by hand: the trunk, and the weight of `lm_head`."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state
    return LinearHead(hidden[:, :-1], model.get_output_embeddings().weight, batch["labels"][:, 1:])


def test_own_head_passes_and_returns_both_errors():
    found = check(llama(), CAUSAL, own, BATCH)
    assert 0 <= found.loss < 1e-6
    assert 0 <= found.gradient < 1e-5


def test_low_rank_adapter_of_the_head_shows_in_the_gradient():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head", "q_proj"]))
    plain = lambda model, batch: trunk(model.get_base_model(), batch)
    with pytest.raises(UserError, match=r"gradient of 'base_model.model.lm_head.lora_B.default.weight'.*error 1\)"):
        check(model, plain, own, BATCH)


def test_scaled_tied_head_of_t5_is_found():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()

    def unscaled(model, batch):
        encoded = model.encoder(input_ids=batch["input_ids"]).last_hidden_state
        ids = model._shift_right(batch["labels"])
        hidden = model.decoder(input_ids=ids, encoder_hidden_states=encoded).last_hidden_state
        return LinearHead(hidden, model.lm_head.weight, batch["labels"])

    with pytest.raises(UserError, match=r"their loss is \d.* and the model's own \d"):
        check(model, unscaled, own, BATCH)
    assert check(model, from_model(), own, BATCH).gradient < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cap_behind_the_head_is_found(dtype):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=V, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.1, **SIZES
    )
    with pytest.raises(UserError, match="model"):
        check(Gemma2ForCausalLM(config).to(dtype), CAUSAL, own, BATCH)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_lost_router_loss_is_found(family):
    import transformers

    experts = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16}}
    options = {"num_experts_per_tok": 2, "output_router_logits": True, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=V, **SIZES, **experts[family], **options)
    with pytest.raises(UserError, match="model's own"):
        check(getattr(transformers, f"{family}ForCausalLM")(config), CAUSAL, own, BATCH)


class Counting(nn.Module):
    """A model with dropout and a counter, and a head that may be called twice."""

    def __init__(self, calls=1):
        super().__init__()
        self.body, self.head, self.drop, self.calls = nn.Linear(6, 8), nn.Linear(8, 5), nn.Dropout(0.5), calls
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        hidden = self.drop(torch.tanh(self.body(x)))
        return sum(self.head(hidden) for _ in range(self.calls)) / self.calls


X, Y = torch.randn(7, 6), torch.arange(7) % 5
FEATURES = from_model("head", 1, call=lambda model, batch: model(batch[0]))


def of_logits(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_dropout_is_the_same_and_state_is_left_as_it_was():
    model = Counting()
    kept = {p: torch.randn_like(p) for p in model.parameters()}
    for p, gradient in kept.items():
        p.grad = gradient
    state = torch.get_rng_state()
    assert check(model, FEATURES, of_logits, (X, Y)).gradient < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert all(p.grad is gradient for p, gradient in kept.items())
    assert model.training


def test_state_is_left_as_it_was_by_a_loss_that_raises():
    model = Counting()
    with pytest.raises(ZeroDivisionError):
        check(model, FEATURES, lambda model, batch: model(batch[0]).sum() / (1 // 0), (X, Y))
    assert model.count == 0
    assert all(p.grad is None for p in model.parameters())


def test_head_that_is_called_twice_is_refused():
    with pytest.raises(UserError, match="calls 'head' 2 times"):
        check(Counting(calls=2), FEATURES, of_logits, (X, Y))


def test_heads_and_a_frozen_parameter_are_compared():
    model = Counting().eval()
    model.body.bias.requires_grad_(False)

    def features(model, batch):
        hidden = torch.tanh(model.body(batch[0]))
        auxiliary = Outputs(hidden, lambda h: h.square().mean())
        return Heads([LinearHead(hidden, model.head.weight, batch[1], bias=model.head.bias), auxiliary], [1.0, 0.1])

    penalised = lambda model, batch: of_logits(model, batch) + 0.1 * torch.tanh(model.body(batch[0])).square().mean()
    assert check(model, features, penalised, (X, Y)).gradient < 1e-5
    with pytest.raises(UserError, match="loss"):
        check(model, features, of_logits, (X, Y))


def test_tolerance_is_the_users():
    slightly = lambda model, batch: 1.01 * of_logits(model, batch)
    with pytest.raises(UserError, match=r"relative error 0.0099"):
        check(Counting(), FEATURES, slightly, (X, Y))
    assert check(Counting(), FEATURES, slightly, (X, Y), rtol=0.02).loss == pytest.approx(0.0099, rel=0.01)


def test_loss_that_is_not_finite_is_named():
    with pytest.raises(UserError, match="nan"):
        check(Counting(), FEATURES, lambda model, batch: of_logits(model, batch) * float("nan"), (X, Y))


def test_static_graph_whose_first_backward_pass_would_be_the_checks_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(llama(), static_graph=True)
        with pytest.raises(UserError, match=r"static_graph=True.*before it is wrapped"):
            check(wrapped, CAUSAL, own, BATCH)
    finally:
        torch.distributed.destroy_process_group()
