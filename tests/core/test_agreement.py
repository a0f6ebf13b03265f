"""JAX, PyTorch and the textbook listing in each give the same gradient in float32, on the trainers' decoder."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import torch
from problems import distance, textbook_jax, textbook_torch

from fsam_core import SAM, FunctionalSAM, LogitSAM, Plain
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import flattened
from fsam_trainers.models.layout import ModelConfig

B2, EPS = 0.95, 1e-8
METHODS = {
    "adamw": Plain(),
    "sam": SAM(0.3),
    "functional": FunctionalSAM(0.3),
    "logit": LogitSAM(0.3),
    "precond-sam": SAM(0.3, precondition="adam"),
    "precond-functional": FunctionalSAM(0.3, precondition="adam"),
    "precond-functional-previous": FunctionalSAM(0.3, precondition="adam", second_moment="previous"),
    "precond-functional-dual": FunctionalSAM(0.1, precondition="adam", norm="dual"),
    "precond-logit-dual-previous": LogitSAM(0.1, precondition="adam", norm="dual", second_moment="previous"),
}
# (tied, method, clip_norm). Clipping reaches the preconditioned directions alone.
CASES = [
    (True, "functional", None),
    (True, "precond-functional", 0.1),
    (False, "sam", None),
    pytest.param(False, "precond-functional-dual", None, marks=pytest.mark.slow),
    pytest.param(False, "precond-logit-dual-previous", 0.1, marks=pytest.mark.slow),
]


class Trained:
    """One decoder in both frameworks with the same weights, each optimizer a few real steps old."""

    def __init__(self, tied: bool) -> None:
        config = ModelConfig(layers=1, width=16, heads=2, seq_len=8, vocab_size=31, tied=tied)
        random = np.random.default_rng(0)
        self.batches = [random.integers(0, 31, (4, 9)) for _ in range(4)]

        self.flax = flax_decoder.Decoder(config)
        self.params = flax_decoder.parameters(config, seed=0)
        tx = optax.adamw(3e-3, b1=0.9, b2=B2, eps=EPS)
        self.state = tx.init(self.params)
        self.model = torch_decoder.Decoder(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(0.9, B2), eps=EPS)
        plain = jax.jit(in_jax.value_and_grad(self.jax_features, Plain()))
        step = in_torch.Step(self.model, self.optimizer, Plain(), features=torch_decoder.features)
        for tokens in self.batches[:3]:
            updates, self.state = tx.update(plain(self.params, {"tokens": tokens})[1], self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)
            step(torch.from_numpy(tokens))
        # Adam's first steps are all but signs of the gradient, so roundings have grown: same values from here on.
        self.own_moments = {k: self.optimizer.state[p]["exp_avg_sq"].clone() for k, p in self.model.named_parameters()}
        torch_decoder.load(self.model, flattened(jax.tree.map(np.asarray, self.params)))
        for name, nu in flattened(in_jax.adam_state(self.state).nu).items():
            self.optimizer.state[self.model.get_parameter(name)]["exp_avg_sq"].copy_(torch.from_numpy(np.array(nu)))

    def jax_features(self, params, batch):
        return flax_decoder.features(self.flax, params, batch)

    def in_jax(self, method, clip_norm):
        call = in_jax.value_and_grad(self.jax_features, method, b2=B2, eps=EPS, clip_norm=clip_norm)
        return flattened(jax.jit(call)(self.params, {"tokens": self.batches[3]}, self.state)[1])

    def in_torch(self, method, clip_norm):
        step = in_torch.Step(self.model, self.optimizer, method, features=torch_decoder.features, clip_norm=clip_norm)
        step.gradient(torch.from_numpy(self.batches[3]))
        return {k: p.grad.numpy() for k, p in self.model.named_parameters()}

    def textbook_jax(self, method, clip_norm):
        adam = in_jax.adam_state(self.state)
        options = {"nu": adam.nu, "steps": int(adam.count), "b2": B2, "eps": EPS, "clip_norm": clip_norm}
        listing = lambda params, batch: textbook_jax(self.jax_features, params, batch, method, **options)
        return flattened(jax.jit(listing)(self.params, {"tokens": self.batches[3]}))

    def textbook_torch(self, method, clip_norm):
        tokens = torch.from_numpy(self.batches[3])
        found = textbook_torch(torch_decoder.features, self.model, tokens, method, self.optimizer, clip_norm)
        return {k: x.numpy() for k, x in found.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request):
    return Trained(request.param)


@pytest.mark.parametrize(("trained", "name", "clip_norm"), CASES, indirect=["trained"])
def test_frameworks_and_textbooks_agree(trained, name, clip_norm):
    method = METHODS[name]
    mine = trained.in_jax(method, clip_norm)
    assert distance(trained.in_torch(method, clip_norm), mine) < 1e-5
    assert distance(trained.textbook_jax(method, clip_norm), mine) < 1e-5
    assert distance(trained.textbook_torch(method, clip_norm), mine) < 1e-5


def test_methods_differ_by_more_than_the_frameworks(trained):
    found = [trained.in_torch(method, None) for method in METHODS.values()]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            assert distance(a, b) > 1e-3


def test_second_moments_of_both_optimizers_agree(trained):
    in_jax_ = flattened(in_jax.adam_state(trained.state).nu)
    assert distance({k: x.numpy() for k, x in trained.own_moments.items()}, in_jax_) < 1e-3
    assert all(x.any() for x in in_jax_.values())
