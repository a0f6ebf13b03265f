"""At which steps there is a correction, what goes from step to step, and schedules of ρ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from formula import momenta, remembered
from problems import B2, EPS, FRAMEWORKS, STEPS, Weights, adamw, as_torch, batch_of, distance, moments
from stacks import I, model, weights

from fsam_core import SAM, Ascent, FunctionalSAM, Plain, Schedule, UserError
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [
        (Schedule(), "cccccc"),
        (Schedule(every=3), "cppcpp"),
        (Schedule(every=3, start=1, between="reuse"), "pcrrcr"),
        (Schedule(probability=0.0), "pppppp"),
    ],
)
def test_kinds_of_steps(schedule, kinds):
    assert "".join(schedule.kind(i)[0] for i in range(6)) == kinds


def test_random_steps_are_drawn_from_seed_and_step_alone():
    drawn = [Schedule(probability=0.25, seed=3).kind(i) for i in range(4000)]
    assert [Schedule(probability=0.25, seed=3).kind(i) for i in range(4000)] == drawn
    assert 0.22 < drawn.count("corrected") / 4000 < 0.28
    assert drawn != [Schedule(probability=0.25, seed=4).kind(i) for i in range(4000)]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "method", [FunctionalSAM(0.3), FunctionalSAM(0.3, fraction=0.5), SAM(0.3, precondition="adam")]
)
def test_steps_between_are_plain_or_reuse_the_correction(framework, method):
    batches = [batch_of(8, seed) for seed in (1, 2, 3)]
    of = lambda some, batch: trajectory(framework, some, [batch], Schedule())[0]
    plain = [of(Plain(), b) for b in batches]
    corrected = of(method, batches[0])
    again = {k: corrected[k] - plain[0][k] for k in corrected}
    seen = trajectory(framework, method, batches, Schedule(every=3, between="reuse"))
    expected = [corrected, *({k: p[k] + again[k] for k in p} for p in plain[1:])]
    for a, b in zip(seen, expected, strict=True):
        assert distance(a, b) < 1e-10
    for a, b in zip(trajectory(framework, method, batches, Schedule(every=3)), [corrected, *plain[1:]], strict=True):
        assert distance(a, b) < 1e-12


def trajectory(framework: str, method: Any, batches: list[dict], schedule: Schedule) -> list[dict]:
    """ĝ of each step with weights and moments that stay as they are."""
    values = weights()
    if framework == "torch":
        net = Weights(values)
        step = in_torch.Step(net, adamw(net, moments(values)), method, features=model, schedule=schedule)
        found = []
        for i, batch in enumerate(batches):
            step.steps = i
            step.gradient(as_torch(batch))
            found.append({k: p.grad.numpy().copy() for k, p in net.named_parameters()})
        return found
    grad = in_jax.value_and_grad(model, method, b2=B2, eps=EPS)
    params = jax.tree.map(jnp.asarray, values)
    state = optax.ScaleByAdamState(jnp.int32(STEPS), momenta(values), moments(values))
    carry, found = in_jax.carry_of(method, params, schedule), []
    for i, batch in enumerate(batches):
        _, g, carry = grad(params, jax.tree.map(jnp.asarray, batch), state, carry, kind=schedule.kind(i))
        found.append({k: np.asarray(x) for k, x in g.items()})
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_previous_gradient_is_that_of_the_last_step(framework):
    batches = [batch_of(8, 1), batch_of(8, 2)]
    seen = trajectory(framework, FunctionalSAM(0.3, ascent="previous"), batches, Schedule())
    plain = trajectory(framework, Plain(), batches[:1], Schedule())[0]
    assert distance(seen[0], plain) < 1e-12  # nothing is remembered yet
    last = Ascent("last", lambda s: s.map(lambda _, x: x, s.momentum, _like(framework, plain, s)), "none")
    expected = trajectory(framework, FunctionalSAM(0.3, ascent=last), batches[1:], Schedule())[0]
    assert distance(seen[1], expected) < 1e-10


def _like(framework: str, grads: dict, seen: Any) -> Any:
    if framework == "jax":
        return {k: jnp.asarray(x) for k, x in grads.items()}
    return [torch.from_numpy(grads[k]) for k in weights_order()]


def weights_order() -> list[str]:
    return [name for name, _ in Weights(weights()).named_parameters()]


def test_non_finite_gradient_is_not_remembered():
    values = weights()
    grad = in_jax.value_and_grad(model, FunctionalSAM(0.3, ascent="previous"), b2=B2)
    params = jax.tree.map(jnp.asarray, values)
    carry = in_jax.Carry(previous=jax.tree.map(jnp.asarray, remembered(values)))
    bad = {"x": np.full((4, I), np.inf), "y": np.arange(4)}
    (_, info), _, after = grad(
        params, bad, optax.ScaleByAdamState(jnp.int32(1), momenta(values), moments(values)), carry
    )
    assert not info.finite
    assert distance(after.previous, carry.previous) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"start": -1}, "start must be a whole number >= 0, got -1"),
        ({"probability": 1.5}, r"probability must be in \[0, 1\], got 1.5"),
        ({"seed": "first"}, "seed must be a whole number >= 0, got 'first'"),
        ({"between": "again"}, "between: 'again' is not known"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        Schedule(**options)


def test_reuse_needs_the_plain_gradient():
    with pytest.raises(UserError, match="'reuse' needs the plain gradient"):
        in_jax.carry_of(FunctionalSAM(0.1, ascent="momentum"), {}, Schedule(between="reuse"))
    net = Weights(weights())
    schedule = Schedule(every=2, between="reuse")
    with pytest.raises(UserError, match="'reuse' needs the plain gradient"):
        in_torch.Step(net, adamw(net), FunctionalSAM(0.1, ascent="micro"), features=model, schedule=schedule)


@pytest.mark.parametrize("kind", ["again", "Corrected"])
def test_unknown_kind_of_step_is_refused(kind):
    with pytest.raises(UserError, match=r"kind: .* use one of corrected, reused, plain"):
        in_jax.value_and_grad(model, Plain())(weights(), batch_of(12, 1), kind=kind)


def test_resumed_step_has_its_state():
    batches = [as_torch(batch_of(8, seed)) for seed in (1, 2, 3, 4)]

    def fresh():
        net = Weights(weights())
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, B2))
        schedule = Schedule(every=3, between="reuse")
        return net, in_torch.Step(net, optimizer, FunctionalSAM(0.3, fraction=0.5), features=model, schedule=schedule)

    net, step = fresh()
    for b in batches:
        step(b)
    first, one = fresh()
    one(batches[0]), one(batches[1])
    second, two = fresh()
    second.load_state_dict(first.state_dict())
    two.optimizer.load_state_dict(one.optimizer.state_dict())
    two.load_state_dict(one.state_dict())
    two(batches[2]), two(batches[3])
    for a, b in zip(net.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rho", [0.5, 0.3])
def test_rho_schedules(rho):
    from fsam_core.schedules import cosine, tied

    at = cosine(rho, 10, final=0.1)
    assert at(0) == pytest.approx(rho)
    assert at(5) == pytest.approx(rho * 0.55)
    assert at(25) == pytest.approx(rho * 0.1)
    assert float(jax.jit(at)(jnp.int32(5))) == pytest.approx(at(5))
    follows = tied(rho, lambda step: 0.01 * (step + 1), 0.1)
    assert follows(4) == pytest.approx(rho * 0.5)
    with pytest.raises(UserError, match="steps must be at least 1"):
        cosine(rho, 0)
    with pytest.raises(UserError, match="peak must be > 0"):
        tied(rho, lambda step: 0.1, 0)
