"""What several files of the core's tests share."""

from __future__ import annotations

import jax
import pytest
import rank_cases


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What each of four processes found in every quick case; one process group serves them all."""
    cases = [*rank_cases.DATA, *rank_cases.TENSOR, *rank_cases.COUNTED, *rank_cases.BEHAVIOUR]
    return rank_cases.run(tmp_path_factory.mktemp("ranks"), cases)


@pytest.fixture(scope="session")
def square_ranks(tmp_path_factory):
    """The same of a 2x2 mesh of data and vocabulary, which `make test` leaves out."""
    return rank_cases.run(tmp_path_factory.mktemp("square"), [*rank_cases.SQUARE])


@pytest.fixture
def float64():
    """JAX computes in float64."""
    with jax.enable_x64(True):
        yield
