"""One step of each framework against the formula in float64: `make smoke`."""

from __future__ import annotations

import pytest
from formula import Formula
from problems import FRAMEWORKS, batch_of, distance
from stacks import got, hidden, weights

from fsam_core import FunctionalSAM


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_is_its_formula(framework, float64):
    method, batches = FunctionalSAM(0.4, precondition="adam", fraction=0.5), [batch_of(8, 1), batch_of(8, 2)]
    expected, length = Formula(hidden, method)(weights(), batches)
    info, grads = got(framework, method, batches)
    assert distance(grads, expected) < 1e-10
    assert float(info.perturbation_norm) == pytest.approx(length, rel=1e-9)
