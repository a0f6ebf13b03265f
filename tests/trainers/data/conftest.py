"""A cache of its own for every test, and child processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FSAM_CACHE", str(folder))
    return folder


@pytest.fixture
def child() -> Callable[..., subprocess.Popen]:
    """Starts `code` in a Python of its own, which finds the same packages."""

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With max_tokens, hold out a twentieth of it, however little that is."""
    monkeypatch.setattr("fsam_trainers.data.pipeline.HELD_OUT_TOKENS", 0)
