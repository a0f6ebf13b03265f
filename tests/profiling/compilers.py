"""Marks of tests that run a compiler for hardware that is not here: left out by `make test`, run by `make test-all`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


def needs_libtpu(test: Test) -> Test:
    """Runs the TPU compiler; skipped where it is not installed."""
    return _needs("libtpu", test)


def needs_triton(test: Test) -> Test:
    """Runs Triton's compilers; skipped where it is not installed."""
    return _needs("triton", test)


def _needs(package: str, test: Test) -> Test:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.compilers(pytest.mark.skipif(missing, reason=f"{package} is not installed")(test))
