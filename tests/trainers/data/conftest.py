"""A cache of its own for every test, and child processes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import spawn


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FSAM_CACHE", str(folder))
    return folder


@pytest.fixture
def child() -> Callable[..., subprocess.Popen[str]]:
    """Starts `code` in a Python of its own."""
    return lambda code, *arguments, **environment: spawn.start("-c", code, *arguments, env=environment)


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With max_tokens, hold out a twentieth of it, however little that is."""
    monkeypatch.setattr("fsam_trainers.data.pipeline.HELD_OUT_TOKENS", 0)
