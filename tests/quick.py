"""Which cases of a parametrised test belong to `make test`; the others are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, those that are not `quick` marked slow."""
    chosen = list(quick)
    marked = [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]
    assert sum(case in chosen for case in marked) == len(chosen), "a quick case is no case"
    return marked
