"""`features_of` models of transformers: the gradient is that of hand-written autograd through their own logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from fsam_core.errors import UserError
from fsam_core.torch import FunctionalSAM, Step
from fsam_core.torch.check import check
from fsam_trainers.integrations.hf_models import features_of
from integrations_models import RHO, L, V, causal_loss, error, joined, reference, token_batches

BATCH = joined(token_batches())
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {"vocab_size": V, "num_key_value_heads": 2, **SIZES}
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ROUTED = {**CAUSAL, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
BERT = {**SIZES, "vocab_size": V, "num_labels": 5}


def make(name, **options):
    kind, _, _ = name.partition("For")
    kind = kind.removesuffix("LMHeadModel")
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**options))


CAUSAL_MODELS = {
    "GPT2LMHeadModel": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": L},
    "LlamaForCausalLM": CAUSAL,
    "Qwen3ForCausalLM": {**CAUSAL, "head_dim": 8},
    "Gemma2ForCausalLM": {**CAUSAL, "head_dim": 8, "final_logit_softcapping": 1.0},
    "MixtralForCausalLM": {**ROUTED, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**ROUTED, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "CohereForCausalLM": CAUSAL,
    "GraniteForCausalLM": {**CAUSAL, "logits_scaling": 4.0},
}
IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 4])}
OTHERS = {
    "T5ForConditionalGeneration": ({**T5, "decoder_start_token_id": 0}, BATCH),
    "BertForMaskedLM": (BERT, BATCH),
    "BertForSequenceClassification": (BERT, {**BATCH, "labels": IMAGES["labels"]}),
    "ViTForImageClassification": ({**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}, IMAGES),
}
SLOW = ("CohereForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GraniteForCausalLM", "BertForMaskedLM")


def families(names):
    return [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in names]


def deviation(model, batch, outputs, loss):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Step(model, optimizer, FunctionalSAM(rho=RHO), features=features_of(model)).gradient(batch)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return error(found, reference(model, outputs, loss))


@pytest.mark.parametrize("name", families(CAUSAL_MODELS))
def test_gradient_of_a_causal_model(name):
    model = make(name, **CAUSAL_MODELS[name]).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    routed, inputs = "Mixtral" in name or "Moe" in name, {"input_ids": BATCH["input_ids"]}

    def outputs(model):
        found = model(**inputs)
        return (found.logits, *found.router_logits) if routed else (found.logits,)

    def loss(logits, *router):
        if not routed:
            return causal_loss(logits, BATCH["labels"])
        balance = __import__(type(model).__module__, fromlist=["x"]).load_balancing_loss_func
        return causal_loss(logits, BATCH["labels"]) + 0.1 * balance(router, 4, 2)

    assert deviation(model, BATCH, outputs, loss) < 1e-5
    check(model, features_of(model), lambda model, batch: model(**batch).loss, BATCH)


@pytest.mark.parametrize("name", families(OTHERS))
def test_gradient_of_another_model(name):
    options, batch = OTHERS[name]
    model = make(name, **options).eval()
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    if "T5" in name:
        inputs["decoder_input_ids"] = model._shift_right(batch["labels"])
    loss = lambda z: F.cross_entropy(z.flatten(0, -2), batch["labels"].flatten())
    assert deviation(model, batch, lambda model: (model(**inputs).logits,), loss) < 1e-5
    check(model, features_of(model), lambda model, batch: model(**batch).loss, batch)


def test_label_smoothing_is_that_of_the_trainer():
    from transformers.trainer_pt_utils import LabelSmoother

    model = make("LlamaForCausalLM", **CAUSAL)

    def smoothed(model, batch):
        return LabelSmoother(0.2)(model(**batch), batch["labels"], shift_labels=True)

    assert check(model, features_of(model, label_smoothing=0.2), smoothed, BATCH).gradient < 1e-5


def test_padding_is_left_out_of_the_router_loss():
    model = make("MixtralForCausalLM", **CAUSAL_MODELS["MixtralForCausalLM"])
    mask = torch.ones_like(BATCH["labels"])
    mask[0, :5] = 0
    batch = {**BATCH, "attention_mask": mask}
    assert check(model, features_of(model), lambda model, batch: model(**batch).loss, batch).gradient < 1e-5


@pytest.mark.slow
def test_router_is_found_in_a_compiled_model_that_was_called_before():
    torch._dynamo.reset()
    model = make("MixtralForCausalLM", **CAUSAL_MODELS["MixtralForCausalLM"])
    expected = features_of(model)(model, BATCH)
    compiled = torch.compile(model, backend="eager")
    compiled(**BATCH)
    head, router = features_of(model)(compiled, BATCH).heads
    assert torch.allclose(head.hidden, expected.heads[0].hidden, atol=1e-6)
    assert torch.allclose(router.loss(router.outputs), expected.heads[1].loss(expected.heads[1].outputs))


REFUSED = {
    "regression": ("BertForSequenceClassification", {**BERT, "num_labels": 1}, "no cross entropy"),
    "several labels": (
        "BertForSequenceClassification",
        {**BERT, "problem_type": "multi_label_classification"},
        "no cross entropy",
    ),
    "several choices": ("BertForMultipleChoice", BERT, "the loss of a BertForMultipleChoice is not known"),
    "no head": ("BertForQuestionAnswering", BERT, "no output embeddings and no classifier"),
    "another router": (
        "SwitchTransformersForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0, "output_router_logits": True},
        "router loss of SwitchTransformersForConditionalGeneration is not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_loss_that_is_not_known_is_refused(case):
    name, options, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        features_of(make(name, **options))


def test_head_of_several_layers_is_refused():
    model = make("RobertaForSequenceClassification", **BERT)
    with pytest.raises(UserError, match="RobertaClassificationHead"):
        features_of(model)(model, {**BATCH, "labels": IMAGES["labels"]})


@pytest.mark.parametrize(("padding", "rows"), [(0, 4), (None, 1)])
@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_classifier_of_a_decoder_sees_the_last_position_that_is_no_padding(name, padding, rows):
    sizes = CAUSAL if "Llama" in name else CAUSAL_MODELS["GPT2LMHeadModel"]
    model = make(name, **{**sizes, "num_labels": 5, "pad_token_id": padding}).eval()
    ids = BATCH["input_ids"][:rows].clone().clamp(min=1)
    if padding is not None:
        ids[0, -3:] = ids[1, :2] = padding
    batch = {"input_ids": ids, "labels": torch.arange(rows)}
    assert check(model, features_of(model), lambda model, batch: model(**batch).loss, batch).gradient < 1e-4
    if padding is None:
        with pytest.raises(UserError, match="pad_token_id is None, which allows one row a batch; got 4"):
            features_of(model)(model, {"input_ids": BATCH["input_ids"], "labels": torch.arange(4)})


def test_labels_that_are_no_whole_numbers_are_refused():
    model = make("BertForSequenceClassification", **BERT)
    with pytest.raises(UserError, match=r"labels: got torch.float32 of shape \(4, 5\), .* Logits\(logits, loss\)"):
        features_of(model)(model, {"input_ids": BATCH["input_ids"], "labels": torch.ones(4, 5)})


def test_prompts_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make("LlamaForCausalLM", **CAUSAL), config)
    with pytest.raises(UserError, match=r"PEFT's .*PROMPT_TUNING puts tokens without labels in front"):
        features_of(model)
