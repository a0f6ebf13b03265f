"""Which parameters a scope holds, by their names; and scopes that do not fit the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import FRAMEWORKS, Weights, adamw, as_torch, batch_of
from stacks import BLOCKS, got, model, weights

from fsam_core import FunctionalSAM, UserError, scopes
from fsam_core import torch as in_torch

NAMES = ["embedding", "block_0_a", "block_0_norm", "block_1_a", "block_1_norm", "final_norm", "head", "head_bias"]


@pytest.mark.parametrize(
    ("scope", "held"),
    [
        ("no-head", NAMES[:-2]),
        ("norms", ["block_0_norm", "block_1_norm", "final_norm"]),
        ("top:2", NAMES[3:]),
        ("top:3", NAMES[1:]),
        (lambda name: name.endswith("_a"), ["block_0_a", "block_1_a"]),
    ],
)
def test_scope_holds_parameters_by_name(scope, held):
    assert [name for name, holds in zip(NAMES, scopes.mask(scope, NAMES, BLOCKS), strict=True) if holds] == held


def test_scope_of_all_parameters_needs_no_names():
    assert scopes.mask("all", NAMES, None) is None


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scope": "top:4"}, "scope: 'top:4' asks for more than the 3 blocks"),
        ({"scope": lambda name: False}, "holds none of the 9 parameters"),
    ],
)
def test_scope_that_does_not_fit_the_model_is_refused(framework, options, says):
    with pytest.raises(UserError, match=says):
        got(framework, FunctionalSAM(0.1, **options), [batch_of(12, 1)])


def test_named_scope_needs_blocks():
    net = Weights(weights())
    with pytest.raises(UserError, match=r"scope: 'norms' needs blocks=Blocks"):
        in_torch.Step(net, adamw(net), FunctionalSAM(0.1, scope="norms"), features=model)


def test_scope_is_looked_up_for_parameters_that_are_added_later():
    net = Weights(weights())
    optimizer = adamw(net)
    step = in_torch.Step(net, optimizer, FunctionalSAM(0.1, scope=lambda name: name == "head"), features=model)
    seen = []
    net.adapter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def features(net, batch):
        seen.append(net.adapter.detach().clone())
        return dataclasses.replace(found := model(net, batch), hidden=found.hidden * net.adapter)

    step.features = features
    optimizer.add_param_group({"params": [net.adapter]})
    step.gradient(as_torch(batch_of(12, 1)))
    assert net.adapter.grad is not None
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_scope_by_name_is_refused_for_parameters_beside_the_model():
    net, beside = Weights(weights()), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*net.parameters(), *beside.parameters()])
    with pytest.raises(UserError, match=r"goes by the names of parameters, and 2 of the optimizer's are not the model"):
        in_torch.Step(net, optimizer, FunctionalSAM(0.1, scope=lambda name: name == "head"), features=model)
