"""What goes from one step to the next, the last gradient and the last correction; and random keys in a batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch
from problems import Weights, as_torch, batch_of, distance, mlp, values

import fsam_core.jax as in_jax
import fsam_core.torch as in_torch
from fsam_core import FunctionalSAM, Schedule
from fsam_core.errors import UserError

PREVIOUS = FunctionalSAM(0.3, ascent="previous")
REUSED = Schedule(every=2, between="reuse")


def torch_step(method, schedule=None, features=mlp):
    model = Weights(values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {} if schedule is None else {"schedule": schedule}
    return in_torch.Step(model, optimizer, method, features=features, **options)


def weights_of(step):
    return {name: p.detach().numpy().copy() for name, p in step.model.named_parameters()}


@pytest.mark.parametrize("to_none", [True, False])
def test_previous_gradient_outlives_zero_grad(to_none):
    step = torch_step(PREVIOUS)
    batch = as_torch(batch_of())
    step(batch)
    before = step.state_dict()["previous"]
    norms = {name: float(x.norm()) for name, x in before.items()}
    step.optimizer.zero_grad(set_to_none=to_none)
    assert {name: float(x.norm()) for name, x in step.state_dict()["previous"].items()} == norms
    assert all(norm > 0 for norm in norms.values())
    step(batch)
    assert step.info.perturbation_norm == pytest.approx(0.3)


def test_previous_gradient_is_the_one_before_clipping():
    batch = as_torch(batch_of())
    found = []
    for clip_norm in (None, 1e-3):
        model = Weights(values())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = in_torch.Step(model, optimizer, PREVIOUS, features=mlp, clip_norm=clip_norm)
        step(batch)
        found.append({name: x.numpy() for name, x in step.state_dict()["previous"].items()})
    assert distance(*found) == 0


def test_memory_of_other_parameters_is_refused():
    step, groups = torch_step(PREVIOUS), torch_step(PREVIOUS)
    step(as_torch(batch_of()))
    state = step.state_dict()
    for change in (lambda given: given.pop(0), lambda given: given.reverse()):
        change(groups.optimizer.param_groups[0]["params"])
        with pytest.raises(UserError, match=r"'previous' has \d+ tensors, which are not of the shapes"):
            groups.load_state_dict(state)


def test_correction_of_a_skipped_step_is_not_reused():
    """Steps 0 and 2 are corrected; the second one is skipped, so step 3 uses the correction of step 0."""
    batch = as_torch(batch_of())
    broken = {**batch, "x": batch["x"] * torch.nan}
    step = torch_step(FunctionalSAM(0.3), REUSED)
    step(batch)
    kept = {name: x.clone() for name, x in step.state_dict()["correction"].items()}
    step(batch)
    step(broken)
    assert step.info.skipped
    after = step.state_dict()["correction"]
    assert all(torch.equal(after[name], x) and x.isfinite().all() for name, x in kept.items())


def noisy(p, batch):
    """The model with noise on its input that comes from the batch's key."""
    noise = jax.random.normal(batch["key"], batch["x"].shape, batch["x"].dtype)
    return mlp(p, {**batch, "x": batch["x"] + 0.1 * noise})


def test_old_style_random_key_goes_whole_into_both_parts():
    """A key from `jax.random.PRNGKey` is an array of two numbers."""
    method = FunctionalSAM(0.3, fraction=1 / 2)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(x) for name, x in values().items()}
        batch = {name: jnp.asarray(x) for name, x in batch_of(4, ignored=0).items()}
        grad = in_jax.value_and_grad(noisy, method)
        old = grad(params, {**batch, "key": jax.random.PRNGKey(3)})[1]
        new = grad(params, {**batch, "key": jax.random.key(3)})[1]
        assert distance(old, new) == 0
        plain = in_jax.value_and_grad(noisy, dataclasses.replace(method, rho=0.0))
        assert distance(old, plain(params, {**batch, "key": jax.random.PRNGKey(3)})[1]) > 1e-3
