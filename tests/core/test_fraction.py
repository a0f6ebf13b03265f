"""The correction on part of the batch: what `test_options` has no formula for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from problems import FRAMEWORKS, batch_of, distance, gradient, mlp, values

from fsam_core import SAM, FunctionalSAM, LogitSAM, Plain, UserError, split

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


def test_rows_are_taken_evenly_and_scalars_go_to_both(framework):
    batch = {"x": np.arange(12).reshape(6, 2), "seed": 7}
    (part,), (rest,) = split.split([batch], 1 / 3, lambda function, leaf: function(leaf))
    np.testing.assert_array_equal(part["x"], [[0, 1], [6, 7]])
    np.testing.assert_array_equal(rest["x"], [[2, 3], [4, 5], [8, 9], [10, 11]])
    assert part["seed"] == rest["seed"] == 7
