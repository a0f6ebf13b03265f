"""The weights that the model computes with: θ, or θ + ε during a second pass.

Outside a call of the step they are θ, also after a pass that raised. What the optimizer updates may be float32 masters,
of which the model's own weights are copies in a narrower dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.torch.dtensor import local
from fsam_core.torch.parallel import Parallel


def masters(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[Tensor, nn.Parameter]:
    """Turn the model's floating parameters to `dtype` and return their masters: what the optimizer is to be given.

        copies = masters(model)
        optimizer = AdamW(copies, lr=3e-4, copies=copies)

    A checkpoint of the optimizer has the masters, and one of the model their copies. Weights to begin with are loaded
    before this call.

    Returns:
        master, a float32 tensor that requires gradients as the parameter does -> the parameter.
    """
    found: dict[Tensor, nn.Parameter] = {}
    for p in model.parameters():
        if p.is_floating_point():
            found[p.detach().float().clone().requires_grad_(p.requires_grad)] = p
            p.data = p.data.to(dtype)
    return found


class Weights:
    """A model's weights and, where they are copies of masters, which of the two is up to date.

    Attributes:
        copies: master -> the model's parameter that is cast from it; empty where the optimizer has the parameters.
        masters: the inverse of `copies`.
    """

    def __init__(self, parallel: Parallel, copies: Mapping[Tensor, nn.Parameter]) -> None:
        self.copies = dict(copies)
        self.masters = {p: master for master, p in copies.items()}
        self._parallel = parallel
        self._needs_sync = False
        self._cloned_heads: dict[int, tuple[Tensor | None, ...]] = {}
        self._buffers: dict[Any, Tensor] = {}

    def destinations(self, params: Sequence[Any]) -> list[Tensor] | None:
        """Where θ + ε of each of these tensors is to be written; None for new arrays.

        Copies of masters are written over. On a CPU the arrays of the last step are used again: new pages cost more
        than what is written to them (into new arrays a perturbation took 2.4 times as long), and the peak is the second
        pass's either way. Other devices have allocators that keep their memory.
        """
        if self.copies:
            return [self.copies[p].data for p in params]
        if self._parallel.sharded or any(p.device.type != "cpu" for p in params):
            return None
        for p in params:
            last = self._buffers.get(p)
            if last is None or last.shape != p.shape or last.dtype != p.dtype:  # model.float() between two steps, say
                self._buffers[p] = torch.empty_like(p, requires_grad=False)
        return [self._buffers[p] for p in params]

    @contextmanager
    def at(self, params: Sequence[Any], moved: list[Tensor]) -> Iterator[None]:
        """The model with `moved` in the place of `params`.

        Without masters `p.data` is swapped and swapped back, so that θ is restored bit for bit. Copies of masters hold
        θ + ε already; they are θ again after `sync_from_masters`, or after the optimizer has written them.
        """
        if self._parallel.sharded:
            with self._shards_at(params, moved):
                yield
            return
        theta = [] if self.copies else [p.data for p in params]
        try:
            if self.copies:
                self._needs_sync = True
                self._cloned_heads.clear()
            else:
                for p, data in zip(params, moved, strict=True):
                    p.data = data
            torch.clear_autocast_cache()  # inside the user's autocast it holds casts of θ
            yield
        finally:
            for p, data in zip(params, theta, strict=False):
                p.data = data
            torch.clear_autocast_cache()

    @contextmanager
    def _shards_at(self, params: Sequence[Any], moved: list[Tensor]) -> Iterator[None]:
        """FSDP2 gathers weights from where its shards lie: those are written over, and written back from a copy."""
        shards, written = [local(p).detach() for p in params], 0
        self._parallel.reshard()
        self._cloned_heads.clear()
        try:
            for i, shard in enumerate(shards):
                there, moved[i] = moved[i], shard.clone()
                written = i + 1
                shard.copy_(there)
            del there
            torch.clear_autocast_cache()
            yield
        finally:
            for shard, theta in zip(shards[:written], moved, strict=False):
                shard.copy_(theta)
            self._parallel.reshard()
            self._cloned_heads.clear()
            torch.clear_autocast_cache()

    def sync_from_masters(self) -> None:
        """Write the copies from their masters, where a perturbation has written over them."""
        if self._parallel.sharded:
            self._cloned_heads.clear()
        if self._needs_sync:
            torch._foreach_copy_([p.data for p in self.copies.values()], [master.data for master in self.copies])
            self.mark_synced()

    def mark_synced(self) -> None:
        """Note that the optimizer has written the copies from the masters."""
        self._needs_sync = False
        self._cloned_heads.clear()

    def saved_cotangent(self, cotangent: Any, place: int) -> Any:
        """A cotangent of a model's head number `place` that outlives these weights, from which it is recomputed.

        Copies of masters are written in place, and the whole of a shard exists during a pass only, so there the head is
        cloned, once for all micro-batches.
        """
        if not (self.copies or self._parallel.sharded) or getattr(cotangent, "w_VxD", None) is None:
            return cotangent
        if place not in self._cloned_heads:
            given = (cotangent.w_VxD, cotangent.bias_V)
            self._cloned_heads[place] = tuple(None if x is None else x.clone() for x in given)
        weight, bias = self._cloned_heads[place]
        return dataclasses.replace(cotangent, w_VxD=weight, bias_V=bias)
