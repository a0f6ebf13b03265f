"""The correction on part of the batch: what `test_options` has no formula for."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from problems import FRAMEWORKS, batch_of, distance, gradient, mlp, values

from fsam_core import SAM, FunctionalSAM, LogitSAM, MicroBatches, Plain, UserError, split
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch

pytestmark = [pytest.mark.parametrize("framework", FRAMEWORKS), pytest.mark.usefixtures("float64")]
METHODS = [SAM(0.1, precondition="adam", norm="dual", second_moment="previous"), FunctionalSAM(0.3), LogitSAM(0.3)]
each_method = pytest.mark.parametrize("method", METHODS, ids=[f"{m.path}-{m.precondition}" for m in METHODS])


def g_of(framework, method, batch):
    return gradient(framework, mlp, method, values(), batch)[2]


def combined(b, moved, s, w=1.0):
    return {k: b[k] + w * (moved[k] - s[k]) for k in b}


def rows(batch, which):
    return {k: x[which] for k, x in batch.items()}


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_mean_over_all_parts_is_the_exact_gradient(framework, method):
    batch = batch_of(12, ignored=0)
    got = [
        g_of(framework, dataclasses.replace(method, fraction=1 / 3), rows(batch, np.roll(np.arange(12), -i)))
        for i in range(3)
    ]
    mean = {k: np.mean([g[k] for g in got], axis=0) for k in got[0]}
    exact = g_of(framework, method, batch)
    assert distance(mean, exact) < 1e-12
    assert distance(got[0], exact) > 1e-3  # one of them alone is an estimate


@each_method
def test_full_fraction_and_strength_are_the_exact_method(framework, method):
    batch = batch_of()
    plain, exact = g_of(framework, Plain(), batch), g_of(framework, method, batch)
    half = g_of(framework, dataclasses.replace(method, strength=0.5), batch)
    assert distance(half, combined(plain, exact, plain, 0.5)) < 1e-13
    none = g_of(framework, dataclasses.replace(method, strength=0.0), batch)
    assert distance(none, plain) < 1e-13
    all_but_one = g_of(framework, dataclasses.replace(method, fraction=1.0, ascent="part"), batch)
    assert distance(all_but_one, exact) == 0


def test_part_without_targets_corrects_nothing(framework):
    batch = batch_of(8, ignored=0)
    batch["y"][::4] = -1
    got = g_of(framework, FunctionalSAM(0.3, fraction=1 / 4), batch)
    assert distance(got, g_of(framework, Plain(), batch)) < 1e-12


def test_batch_that_cannot_be_split_is_refused(framework):
    with pytest.raises(UserError, match=r"fraction: 1/8 of a \(micro-\)batch of 12 rows"):
        g_of(framework, FunctionalSAM(0.3, fraction=1 / 8), batch_of(12))
    for tiny in (1e-6, 1 - 1e-6):  # not nothing and not all
        with pytest.raises(UserError, match=r"fraction: \d+/65536 of a \(micro-\)batch of 12 rows"):
            g_of(framework, FunctionalSAM(0.3, fraction=tiny), batch_of(12))
    bad = {**batch_of(12), "extra": np.zeros(5)}
    with pytest.raises(UserError, match="one first axis to be cut along, got 5, 12"):
        g_of(framework, FunctionalSAM(0.3, fraction=1 / 4), bad)


def squares(p, batch):
    """A regression on outputs, whose loss is a mean over rows and which says nothing of weights."""
    z = (batch["x"] @ p["a"]) @ p["w"].T
    of = in_jax if isinstance(z, jax.Array) else in_torch
    return of.Logits(z, lambda z: (z**2).mean())


@pytest.mark.parametrize("options", [{"fraction": 1 / 4}, {"fraction": 1 / 4, "form": "split", "ascent": "rest"}, {}])
def test_a_mean_over_rows_weighs_each_part_by_its_rows(framework, options):
    """At ρ = 0 the gradient is that of the whole batch, and micro-batches of 2 and of 10 rows are one of 12."""
    batch, method = batch_of(12, ignored=0), FunctionalSAM(0.0, **options)
    whole = gradient(framework, squares, Plain(), values(), batch)
    given = batch if options else MicroBatches([rows(batch, slice(0, 2)), rows(batch, slice(2, 12))])
    loss, info, g = gradient(framework, squares, method, values(), given)
    assert distance(g, whole[2]) < 1e-12
    if options.get("form") != "split":  # whose loss is that of two parts at two points
        assert loss == pytest.approx(whole[0], rel=1e-12)
    assert float(info.weight) == 12


def test_a_loss_in_the_place_of_outputs_is_refused(framework):
    """Its derivative is 1 at any weights, so nothing of the method would be left."""

    def loss_itself(p, batch):
        found = squares(p, batch)
        return type(found)(found.loss(found.logits), lambda loss: loss)

    for method in (FunctionalSAM(0.1), LogitSAM(0.1)):
        with pytest.raises(UserError, match=r"the output is a scalar, the loss itself, .* return the logits"):
            gradient(framework, loss_itself, method, values(), batch_of(12))
    exact = gradient(framework, squares, SAM(0.1), values(), batch_of(12))[2]
    assert distance(gradient(framework, loss_itself, SAM(0.1), values(), batch_of(12))[2], exact) < 1e-12


def test_lists_with_a_value_for_each_row_are_cut(framework):
    """As a loader collates texts and lengths."""
    batch = {"x": np.arange(12).reshape(6, 2), "texts": list("abcdef"), "lengths": (1, 2, 3, 4, 5, 6), "of": [7, 8]}
    (part,), (rest,) = split.split([batch], 1 / 3, lambda function, leaf: function(leaf))
    assert (part["texts"], rest["texts"]) == (["a", "d"], ["b", "c", "e", "f"])
    assert (part["lengths"], rest["lengths"]) == ((1, 4), (2, 3, 5, 6))
    assert part["of"] == rest["of"] == [7, 8]


def test_a_mapping_whose_copies_share_its_items_is_not_written_to(framework):
    graph, state = nnx.split(nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    before = jax.tree.leaves(state)
    batch = {"x": np.arange(18).reshape(6, 3), "state": state}
    (part,), _ = split.split([batch], 1 / 3, jax.tree.map)
    assert [x.shape for x in jax.tree.leaves(state)] == [(6,)] * len(before)
    assert all(x is y for x, y in zip(jax.tree.leaves(state), before, strict=True))
    assert part["x"].shape == (2, 3)
    nnx.merge(graph, split.with_own_containers(batch)["state"])


def test_sparse_tensors_of_a_batch_are_not_cut(framework):
    for x in (torch.eye(6).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])):
        with pytest.raises(UserError, match="a sparse or nested tensor of the batch cannot be cut; give MicroBatches"):
            split.split([{"x": x}], 1 / 2, lambda function, leaf: function(leaf))


def test_rows_are_taken_evenly_and_scalars_go_to_both(framework):
    batch = {"x": np.arange(12).reshape(6, 2), "seed": 7}
    (part,), (rest,) = split.split([batch], 1 / 3, lambda function, leaf: function(leaf))
    np.testing.assert_array_equal(part["x"], [[0, 1], [6, 7]])
    np.testing.assert_array_equal(rest["x"], [[2, 3], [4, 5], [8, 9], [10, 11]])
    assert part["seed"] == rest["seed"] == 7
