"""Steps of training with the head of this package and with the model's own logits: the same losses, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from fsam_core import FunctionalSAM, Method, Plain
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import Memory
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.layout import ModelConfig

STEPS, V, L = 120, 257, 16
CONFIG = ModelConfig(layers=1, width=24, heads=2, seq_len=L, vocab_size=V, tied=True)
METHODS = {"adamw": Plain(), "precond-functional-sam": FunctionalSAM(0.1, precondition="adam")}
CHUNKED = {form: Memory(form, chunk_bytes=30 * V * 8) for form in ("keep", "recompute")}


def batches() -> np.ndarray:
    """Text that can be learned: a token is followed by a function of itself, nine times of ten."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (STEPS, 4, L + 1))
    for i in range(L):
        follows = random.random((STEPS, 4)) < 0.9
        tokens[..., i + 1] = np.where(follows, (3 * tokens[..., i] + 1) % V, tokens[..., i + 1])
    return tokens


def trained_jax(method: Method, written_out: bool, memory: Memory) -> list[float]:
    model = flax_decoder.Decoder(CONFIG)

    def features(params, batch):
        head = flax_decoder.features(model, params, batch)
        if not written_out:
            return head
        loss = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, head.labels).mean()
        h_NxD = head.hidden.reshape(-1, head.hidden.shape[-1])
        return in_jax.Logits(h_NxD @ head.weight.T, loss, head.labels.size)

    params = flax_decoder.parameters(CONFIG, seed=0)
    tx = optax.adamw(3e-3, b2=0.95)
    grad = in_jax.value_and_grad(features, method, b2=0.95, memory=memory)

    @jax.jit
    def step(params, state, tokens):
        (loss, _), grads = grad(params, {"tokens": tokens}, state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for tokens in jnp.asarray(batches()):
        params, state, loss = step(params, state, tokens)
        losses.append(float(loss))
    return losses


def trained_torch(method: Method, written_out: bool, memory: Memory) -> list[float]:
    model = torch_decoder.Decoder(CONFIG, seed=0)

    def features(model, tokens):
        head = torch_decoder.features(model, tokens)
        if not written_out:
            return head
        loss = lambda z: F.cross_entropy(z, head.labels)
        h_NxD = head.hidden.reshape(-1, head.hidden.shape[-1])
        return in_torch.Logits(h_NxD @ head.weight.T, loss, head.labels.numel())

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    step = in_torch.Step(model, optimizer, method, features=features, memory=memory)
    return [float(step(tokens)) for tokens in torch.from_numpy(batches())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("precond-functional-sam", "keep"),
        pytest.param("precond-functional-sam", "recompute", marks=pytest.mark.slow),
        pytest.param("adamw", "recompute", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("train", [trained_jax, trained_torch], ids=["jax", "torch"])
def test_losses_are_those_of_written_out_logits(train, name, form):
    ours, plain = (train(METHODS[name], written_out, CHUNKED[form]) for written_out in (False, True))
    assert np.abs(np.array(ours) - plain).max() < 1e-4
    assert np.mean(ours[-10:]) < np.mean(ours[:10]) - 1  # it learned, so it had losses to differ in
