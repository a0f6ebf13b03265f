"""The step on models that were not written here: transformers' Llama and GPT-2, and Flax's `Embed.attend` as a head."""

from __future__ import annotations

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import B2, EPS, METHODS, adam_state, adamw, distance, flat, moments
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fsam_kernels.torch
from fsam_core import FunctionalSAM, Plain
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import Memory

V, L = 101, 12


def llama(tied: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, tie_word_embeddings=tied, **sizes))


def gpt2(tied: bool) -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": L}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, tie_word_embeddings=tied, **sizes))


def linear_head(model, ids):
    """Three lines that a user writes: the trunk, the head's weight, the labels."""
    hidden = model.base_model(ids).last_hidden_state
    return in_torch.LinearHead(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])


def logits(model, ids):
    """The same through the model's own head."""
    loss = lambda z: F.cross_entropy(z.reshape(-1, V), ids[:, 1:].reshape(-1))
    return in_torch.Logits(model(ids).logits[:, :-1], loss, ids[:, 1:].numel())


MODELS = [(llama, True), (llama, False), (gpt2, True), (gpt2, False)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0].__name__}-{'tied' if m[1] else 'untied'}")
def model(request):
    build, tied = request.param
    torch.manual_seed(0)
    model = build(tied).double().eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model


def batches() -> list[torch.Tensor]:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (4, L)))
    return [ids[:2], ids[2:]]


def gradient(model, features, method, **options):
    nu = {k: np.asarray(x) for k, x in moments({k: p.detach().numpy() for k, p in model.named_parameters()}).items()}
    step = in_torch.Step(model, adamw(model, nu), method, features=features, **options)
    loss = step.gradient(in_torch.MicroBatches(batches()))
    return float(loss), {k: p.grad.numpy().copy() for k, p in model.named_parameters()}


NAMES = ["adamw", "sam", "precond-functional", "logit"]


@pytest.mark.parametrize("cotangent", ["keep", pytest.param("recompute", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_torch_gradient_is_that_of_the_model_head(model, name, cotangent):
    memory = Memory(cotangent, chunk_bytes=5 * V * 8)
    loss, got = gradient(model, linear_head, METHODS[name], memory=memory)
    expected_loss, expected = gradient(model, logits, METHODS[name])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert distance(got, expected) < 1e-10
    if name != "adamw":
        assert distance(got, gradient(model, linear_head, Plain())[1]) > 1e-4


def test_torch_hidden_cut_runs_and_is_a_near_twin(model):
    method = FunctionalSAM(0.3, precondition="adam")
    exact, plain = gradient(model, linear_head, method)[1], gradient(model, linear_head, Plain())[1]
    twin = gradient(model, linear_head, FunctionalSAM(0.3, precondition="adam", cut="hidden"))[1]
    correction = {k: exact[k] - plain[k] for k in exact}
    of_twin = {k: twin[k] - plain[k] for k in exact}
    cosine = flat(correction) @ flat(of_twin) / np.linalg.norm(flat(correction)) / np.linalg.norm(flat(of_twin))
    assert cosine > 0.3


def test_torch_trains(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = in_torch.Step(model, optimizer, FunctionalSAM(0.05, precondition="adam"), features=linear_head)
    losses = [float(step(in_torch.MicroBatches(batches()))) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_torch_cross_entropy_is_the_models_own_loss(model):
    ids = batches()[0]
    expected = model(ids, labels=ids).loss
    got = fsam_kernels.torch.cross_entropy(
        model.base_model(ids).last_hidden_state[:, :-1], model.lm_head.weight, ids[:, 1:]
    )
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


class Attending(flax.linen.Module):
    """A Flax model whose head is its embedding's `attend`."""

    def setup(self):
        self.embed = flax.linen.Embed(V, 16)
        self.mix = flax.linen.Dense(16)

    def hidden(self, ids):
        return jnp.tanh(self.mix(self.embed(ids)))

    def __call__(self, ids):
        return self.embed.attend(self.hidden(ids))


@pytest.mark.parametrize("name", ["sam", "precond-functional"])
def test_flax_gradient_is_that_of_embed_attend(name):
    with jax.enable_x64(True):
        model = Attending()
        parts = [jnp.asarray(x.numpy()) for x in batches()]
        params = jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(0), parts[0])["params"])
        named = {f"{a}.{b}": x for a, leaves in params.items() for b, x in leaves.items()}
        nu = moments({k: np.asarray(x) for k, x in named.items()})
        nu = {a: {b: jnp.asarray(nu[f"{a}.{b}"]) for b in leaves} for a, leaves in params.items()}

        def linear_head(p, ids):
            h = model.apply({"params": p}, ids, method="hidden")
            return in_jax.LinearHead(h[:, :-1], p["embed"]["embedding"], ids[:, 1:])

        def attend(p, ids):
            z, y = model.apply({"params": p}, ids)[:, :-1], ids[:, 1:]
            loss = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1).mean()
            return in_jax.Logits(z, loss, y.size)

        def grads(features, memory):
            call = in_jax.value_and_grad(features, METHODS[name], b2=B2, eps=EPS, memory=memory)
            found = jax.jit(call)(params, in_jax.MicroBatches(parts), adam_state(params, nu))[1]
            return {f"{a}.{b}": np.asarray(x) for a, leaves in found.items() for b, x in leaves.items()}

        assert distance(grads(linear_head, Memory(chunk_bytes=5 * V * 12)), grads(attend, Memory())) < 1e-12
