"""The command in several processes that train together, and what its metrics say."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import spawn

HINDERED = Path(__file__).with_name("hindered_run.py")  # on the machine's own disk unless HINDERED_ variables are set
SLOW_STEPS = {"HINDERED_STEP_SECONDS": "0.03"}  # so that a run of small steps can be interrupted


def torchrun(ranks: int, command: Sequence[str], **options) -> subprocess.Popen[str]:
    """torchrun's process, of the command in so many ranks."""
    return spawn.torchrun(ranks, HINDERED, *command, env=SLOW_STEPS, **options)


@contextlib.contextmanager
def jax_processes(count: int, command: Sequence[str], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The command in so many JAX processes."""
    with spawn.jax_processes(count, HINDERED, *command, env=SLOW_STEPS | environment) as processes:
        yield processes


def figures(out: Path, names: Sequence[str] = ("loss", "val_loss", "grad_norm")) -> dict[tuple[int, str], float]:
    """(step, name) -> what the metrics of a run say."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return {(x["step"], name): x[name] for x in lines for name in names if name in x}
