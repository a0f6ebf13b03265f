"""Ascents beyond the array of `test_options`: random, one of the user's, and passes on two devices."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from formula import Formula, momenta, part_of
from problems import B2, EPS, FRAMEWORKS, STEPS, Weights, as_given, batch_of, distance, moments
from stacks import got, hidden, model, weights

from fsam_core import SAM, Ascent, FunctionalSAM, UserError
from fsam_core import jax as in_jax
from fsam_core.torch import rng

pytestmark = pytest.mark.usefixtures("float64")
ONE = [batch_of(12, 1)]


def test_random_ascent_is_drawn_from_seed_and_step():
    values = weights()
    names = list(Weights(values).state_dict())
    drawn = rng.normal([torch.from_numpy(values[k]) for k in names], 7, STEPS)
    method = FunctionalSAM(0.4, ascent="random", seed=7)
    expected, _ = Formula(hidden, method, drawn=dict(zip(names, map(np.asarray, drawn), strict=True)))(values, ONE)
    assert distance(got("torch", method, ONE)[1], expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_random_ascent_repeats_and_differs_by_seed(framework):
    of = lambda seed: got(framework, FunctionalSAM(0.4, ascent="random", seed=seed), ONE)[1]
    assert distance(of(1), of(1)) == 0
    assert distance(of(1), of(2)) > 1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_user_ascent_sees_gradient_and_momentum(framework):
    """The gradient itself, computed from both, is the full ascent."""
    mine = Ascent("mine", lambda seen: seen.map(lambda g, m: (g + m) - m, seen.gradient, seen.momentum))
    expected = got(framework, FunctionalSAM(0.4), ONE)[1]
    assert distance(got(framework, FunctionalSAM(0.4, ascent=mine), ONE)[1], expected) < 1e-12
    known = Ascent("known", lambda seen: seen.gradient, "none")
    with pytest.raises(UserError, match="source must be 'full' or 'part'"):
        got(framework, FunctionalSAM(0.4, ascent=known), ONE)


def test_correction_on_random_parts_is_unbiased():
    """The mean over every part of a batch is the exact gradient; the perturbation is the full batch's."""
    batch, method = batch_of(8, 1, ignored=0), FunctionalSAM(0.4, fraction=0.25)
    exact = got("torch", FunctionalSAM(0.4), [batch])[1]
    found = []
    for chosen in itertools.combinations(range(8), 2):
        others = [i for i in range(8) if i not in chosen]
        # Every 4th row carries the correction.
        order = [chosen[0], *others[:3], chosen[1], *others[3:]]
        found.append(got("torch", method, [{k: x[order] for k, x in batch.items()}])[1])
        assert part_of([{"i": np.array(order)}], 0.25)[0]["i"].tolist() == list(chosen)
    mean = {k: np.mean([g[k] for g in found], axis=0) for k in exact}
    assert distance(mean, exact) < 1e-12
    assert distance(found[0], exact) > 1e-3


@pytest.mark.parametrize("batches", [ONE, [batch_of(8, 1), batch_of(8, 2)]], ids=["one", "two"])
def test_independent_passes_run_on_two_devices(batches):
    method = SAM(0.4, ascent="momentum", strength=0.3, precondition="adam")
    values, batch = jax.tree.map(jnp.asarray, (weights(), as_given(batches)))
    state = optax.ScaleByAdamState(jnp.int32(STEPS), momenta(weights()), moments(weights()))
    state = jax.tree.map(jnp.asarray, state)
    alone = in_jax.value_and_grad(model, method, b2=B2, eps=EPS)
    (loss, info), expected = jax.jit(alone)(values, batch, state)
    mesh = jax.make_mesh((2,), ("passes",), devices=jax.devices()[:2])
    apart = in_jax.value_and_grad(model, method, b2=B2, eps=EPS, pass_axis="passes")
    with jax.set_mesh(mesh):
        compiled = jax.jit(apart).lower(values, batch, state).compile()
        (found_loss, found), grads = compiled(values, batch, state)
    assert distance(grads, expected) < 1e-12
    for a, b in zip((found_loss, *found), (loss, *info), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-9)
    if len(batches) == 1:  # of a loop over micro-batches XLA counts one turn
        both = jax.jit(alone).lower(values, batch, state).compile().cost_analysis()["flops"]
        assert compiled.cost_analysis()["flops"] < 0.75 * both


@pytest.mark.parametrize("method", [SAM(0.1), SAM(0.1, ascent="momentum"), FunctionalSAM(0.1, ascent="momentum")])
def test_dependent_passes_on_two_devices_are_refused(method):
    with pytest.raises(UserError, match="pass_axis: two passes wait for each other but for SAM"):
        in_jax.value_and_grad(model, method, pass_axis="passes")
