"""Peak memory of training steps, each variant in a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np

from fsam_trainers import engine
from fsam_trainers.settings import Settings

STEPS = 3


def peak_bytes(settings: Settings, tokens_BxL1: np.ndarray) -> int | None:
    """By how much a process that holds weights and optimizer state grows at the peak of a step; None outside Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (settings, tokens_BxL1))


def _grown(settings: Settings, tokens_BxL1: np.ndarray) -> int | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    trained = engine.make(settings)
    trained.prepare(tokens_BxL1)
    trained.step(tokens_BxL1, 0)()  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    for i in range(1, STEPS):
        trained.step(tokens_BxL1, i)()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
