"""Peak memory of training steps, each variant in a process of its own."""

from __future__ import annotations

import multiprocessing

from fsam_profiling.timing import process_memory, variants
from fsam_profiling.timing.variants import Variant

STEPS = 3


def peak_bytes(variant: Variant) -> int | None:
    """Growth of a process that holds weights and optimizer state at the peak of a step; None outside Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (variant,))


def _grown(variant: Variant) -> int | None:
    if not process_memory.is_known():
        return None
    run = variants.make(variant)
    run(0)  # libraries allocate some memory once
    return max(0, process_memory.growth(lambda: [run(i) for i in range(1, STEPS)]))
