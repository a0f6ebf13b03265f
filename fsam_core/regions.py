"""Named regions of a step, for profilers: torch.profiler and NVTX ranges in PyTorch, operation names in JAX.

    with regions.in_jax("norm"): ...          with regions.in_torch("norm"): ...

A forward region contains the trunk only. The head computes the loss and its gradient in one pass, which belongs to the
backward region. `fsam profile trace` and `fsam profile tpu --what step` sum time by these names.

Importing this imports neither framework.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

Region = Literal[
    "base forward", "base backward", "norm", "perturb", "second forward", "second backward", "update"
]  # fmt: skip
REGIONS: tuple[Region, ...] = get_args(Region)


def in_jax(name: Region) -> contextlib.AbstractContextManager[None]:
    """Operations traced inside carry the name, and so do the instructions that XLA compiles them to."""
    import jax

    return jax.named_scope(name)


def in_torch(name: Region) -> contextlib.AbstractContextManager[Any]:
    """A range of host time with that name, and an NVTX range where CUDA is initialised.

    Work that runs later on a GPU belongs to the range in which it was launched.
    """
    import torch

    region = torch.profiler.record_function(name)
    if not torch.cuda.is_initialized():
        return region
    both = contextlib.ExitStack()
    both.enter_context(torch.cuda.nvtx.range(name))
    both.enter_context(region)
    return both
