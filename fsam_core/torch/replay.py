"""What both passes of a step must see alike besides weights and batch: random draws and the model's buffers.

Draws are PyTorch's, Python's and NumPy's (transformers masks speech with NumPy).

Every micro-batch of a second pass begins with the generators and buffers that it began with in the base pass, and the
model ends with those of one forward pass, whatever writes them: BatchNorm, an exponential average, a counter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fsam_core.errors import UserError

Slot = tuple[nn.Module, str]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class State(NamedTuple):
    """The states of PyTorch's generators by device (None: the CPU's), of the others, and each buffer with its value."""

    generators: dict[Any, Tensor]
    python: Any
    numpy: Any
    buffers: dict[Slot, tuple[Tensor, Tensor]]


class Replay:
    """Saves and restores the state of a model's forward pass.

    Only buffers that change are copied. Which do is seen in the first corrected step, by their values: writes through
    `.data` change no version. A buffer whose first change is in a later step is found by its version or its identity
    and copied from the next step on. Parameters that are not trained may be too large to be copied; there a write is
    refused, which the first corrected step sees by their sums.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: dict[Slot, tuple[Tensor, Tensor]] | None = None
        self._frozen: dict[str, Tensor] = {}
        self._changing: set[Slot] | None = None
        self._versions: dict[Slot, tuple[int, int]] = {}

    def state(self) -> State:
        """The present state; of the generators that of the CPU and of the devices that the model is on."""
        devices = {p.device for p in self._model.parameters() if p.device.type not in ("cpu", "meta")}
        generators: dict[Any, Tensor] = {None: torch.get_rng_state()}
        generators |= {d: torch.get_device_module(d).get_rng_state(d) for d in devices}
        wanted = self._buffers()
        if self._changing is not None:
            wanted = {slot: wanted[slot] for slot in self._changing if slot in wanted}
        saved = {slot: (buffer, buffer.detach().clone()) for slot, buffer in wanted.items()}
        if self._changing is None and self._first is None:
            self._first, self._frozen = saved, self._frozen_sums()
        # NumPy's global state: what others' forward passes draw from.
        return State(generators, random.getstate(), np.random.get_state(legacy=False), saved)  # noqa: NPY002

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """The state as it was; buffers that were replaced since are put back."""
        for device, one in state.generators.items():
            if device is None:
                torch.set_rng_state(one)
            else:
                torch.get_device_module(device).set_rng_state(one, device)
        random.setstate(state.python)
        np.random.set_state(state.numpy)  # noqa: NPY002
        for (module, name), (buffer, value) in state.buffers.items():
            # `.data`, because a graph that is still to be run backwards may hold the buffer: it has the same values.
            buffer.data.copy_(value)
            module._buffers[name] = buffer

    @contextmanager
    def replayed(self, *, counts: bool = False) -> Iterator[State]:
        """A pass that repeats another: generators and buffers end as they are now.

        With `counts` it continues with micro-batches of its own, and generators and buffers end as these leave them.
        """
        self._settle()
        before = self.state()
        try:
            yield before
        except BaseException:
            counts = False
            raise
        finally:
            if not counts:
                self.restore(before)

    def _buffers(self) -> dict[Slot, Tensor]:
        every = [(m, name, b) for m in self._model.modules() for name, b in m._buffers.items()]
        return {(m, name): b for m, name, b in every if b is not None and b.device.type != "meta"}

    def _frozen_sums(self) -> dict[str, Tensor]:
        """Of each parameter that is not trained the sum of its bits as integers, which shows a change by rounding, too.

        A momentum encoder begins as a copy, and its first average is that copy but for rounding.
        """
        frozen = {name: p.detach() for name, p in self._model.named_parameters() if not p.requires_grad}
        plain = {
            name: x for name, x in frozen.items() if type(x) is Tensor and x.itemsize in INTEGERS and not x.is_meta
        }
        return {name: x.view(INTEGERS[x.itemsize]).sum(dtype=torch.int64) for name, x in plain.items()}

    def _settle(self) -> None:
        """Find the buffers that the base pass has changed.

        Raises:
            UserError: for a parameter that is not trained and that the pass has written.
        """
        now = self._buffers()
        if self._changing is None:
            if self._first is None:
                return
            frozen, now_frozen = self._frozen, self._frozen_sums()
            written = [name for name in frozen if name in now_frozen and int(frozen[name]) != int(now_frozen[name])]
            if written:
                raise UserError(
                    f"model: its forward pass writes {written[0]}, a parameter that is not trained, and would do so in "
                    "both passes of a step; make it a buffer, or write it after the step"
                )
            self._changing = {slot for slot, saved in self._first.items() if _has_changed(now.get(slot), *saved)}
            self._first, self._frozen = None, {}
        else:
            self._changing |= {
                slot for slot, seen in self._versions.items() if slot in now and _seen(now[slot]) != seen
            }
        self._versions = {slot: _seen(buffer) for slot, buffer in now.items() if slot not in self._changing}


def _seen(buffer: Tensor) -> tuple[int, int]:
    return id(buffer), buffer._version


def _has_changed(now: Tensor | None, before: Tensor, value: Tensor) -> bool:
    return now is not before or not torch.equal(now, value)
