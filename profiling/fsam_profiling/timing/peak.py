"""Peak memory of training steps, each variant in a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from fsam_profiling.timing import variants
from fsam_profiling.timing.variants import Variant

STEPS = 3


def peak_bytes(variant: Variant) -> int | None:
    """Growth of a process that holds weights and optimizer state at the peak of a step; None outside Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (variant,))


def _grown(variant: Variant) -> int | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    run = variants.make(variant)
    run(0)  # libraries allocate some memory once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    for i in range(1, STEPS):
        run(i)
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
