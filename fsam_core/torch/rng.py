"""What a second pass repeats and leaves alone: the draws of PyTorch's generators, and running statistics.

Both passes of a step draw the same numbers, and generators and statistics end as after one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.torch.dtensor import shard_like

State = dict[Any, Tensor]


def state(model: nn.Module) -> State:
    """Of the CPU's generator and of those of the devices that the model is on."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    return {None: torch.get_rng_state(), **{d: torch.get_device_module(d).get_rng_state(d) for d in devices}}


def restore(states: State) -> None:
    for device, one in states.items():
        if device is None:
            torch.set_rng_state(one)
        else:
            torch.get_device_module(device).set_rng_state(one, device)


@contextmanager
def replayed(model: nn.Module, *, draws_count: bool = False) -> Iterator[None]:
    """A pass that repeats another: generators and running statistics (BatchNorm's) end as they are now.

    With `draws_count` it makes draws that no other pass has made, and the generators end after these.
    """
    before = state(model)
    modules = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        if not draws_count:
            restore(before)


def normal(like: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Standard normal tensors, drawn from (seed, step) alone; of a DTensor's, this rank's part of the same."""
    generators: dict[torch.device, torch.Generator] = {}
    drawn = []
    for x in like:
        if x.device not in generators:
            words = torch.tensor([seed, step]).mul_(torch.tensor([0x9E3779B1, 0x85EBCA77])).sum()
            generators[x.device] = torch.Generator(x.device).manual_seed(int(words) % 2**63)
        kind = torch.promote_types(x.dtype, torch.float32)
        whole = torch.randn(x.shape, generator=generators[x.device], dtype=kind, device=x.device)
        drawn.append(shard_like(x, whole))
    return drawn
