"""The method is switched on in the middle of a plain torch.optim.AdamW run, and off again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks_run import Model, batch_of, features

from fsam_core.torch import AdamW, FunctionalSAM, Plain, Step

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}
METHOD = FunctionalSAM(0.1, precondition="adam")


def by_hand(model, optimizer, steps):
    """The loop that knows nothing of fsam."""
    for step in steps:
        (batch,) = batch_of(step, 1, None)
        optimizer.zero_grad()
        logits = model(batch["x"]) @ model.embedding.T
        F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), ignore_index=-1).backward()
        optimizer.step()


def by_step(model, optimizer, method, steps):
    step = Step(model, optimizer, method, features=features)
    for index in steps:
        step(batch_of(index, 1, None))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.fixture
def started():
    """(model, its torch.optim.AdamW) five plain steps into a run."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    by_hand(model, optimizer, range(5))
    return model, optimizer


def moved(model, optimizer, kind):
    """The same model and state under an optimizer of that kind, through its state_dict."""
    model = copy.deepcopy(model)
    other = kind(model.parameters(), **SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, other


def test_switching_on_and_off_keeps_the_run(started):
    found = []
    for kind in (torch.optim.AdamW, AdamW):
        model, optimizer = moved(*started, kind)
        by_step(model, optimizer, METHOD, range(5, 10))
        model, optimizer = moved(model, optimizer, torch.optim.AdamW)
        assert {int(state["step"]) for state in optimizer.state.values()} == {10}
        by_hand(model, optimizer, range(10, 13))
        found.append(weights(model))
    assert_close(*found)
    by_hand(*started, range(5, 13))
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], weights(started[0]), strict=True)) > 1e-3


def test_step_without_correction_continues_the_plain_loop(started):
    model, optimizer = moved(*started, AdamW)
    by_step(model, optimizer, Plain(), range(5, 10))
    by_hand(*started, range(5, 10))
    assert_close(weights(model), weights(started[0]))
