"""The parts of a step by name, for profilers: torch.profiler and NVTX in PyTorch, the names of operations in JAX.

    with regions.in_jax("norm"): ...          with regions.in_torch("norm"): ...

A forward region is the trunk's; the head, whose one pass gives the loss and its gradient together, belongs to the
backward region beside it. `fsam profile trace` and `fsam profile tpu --what step` sum up time by these names.

Importing this imports neither framework.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

Region = Literal[
    "base forward", "base backward", "norm", "perturb", "second forward", "second backward", "update"
]  # fmt: skip
REGIONS: tuple[Region, ...] = get_args(Region)


def in_jax(name: Region) -> contextlib.AbstractContextManager[None]:
    """Operations that are traced inside carry the name, and so do the instructions that XLA makes of them."""
    import jax

    return jax.named_scope(name)


@contextlib.contextmanager
def in_torch(name: Region) -> Iterator[None]:
    """A range of the host's time under that name; on a GPU in use an NVTX range as well.

    Work that is launched inside and runs later on a GPU is told by the time of its launch.
    """
    import torch

    nvtx = torch.cuda.is_initialized()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
