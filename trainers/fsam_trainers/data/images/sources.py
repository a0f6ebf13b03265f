"""Images by number: stored as arrays, or encoded and decoded when they are asked for."""

import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.images.decoding import Decoded, Form, Item, decode
from fsam_trainers.data.worker_process import WorkerProcess

IGNORED = -1  # the label of an image that cannot be used: it is no target
SKIPPED = 10  # images that may be left out, and one in a hundred

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Images and labels by number, 0 … N − 1."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]."""

    def digest(self) -> bytes:
        """Identifies images and labels."""

    def pixels(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n, H, W, C], bool [n] of those that could be used)."""

    def part(self, numbers: np.ndarray) -> "Source":
        """These images alone."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Images in memory. array: uint8 [N, H, W, C]."""

    array: np.ndarray
    labels: np.ndarray

    def digest(self) -> bytes:
        return _digest("stored", repr(self.array.shape).encode(), self.array, self.labels)

    def pixels(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.array[numbers], np.ones(len(numbers), bool)

    def part(self, numbers: np.ndarray) -> "Stored":
        return Stored(self.array[numbers], self.labels[numbers])


class Decoders:
    """`count` processes that decode; with 0 the calling one does. They start with the first image, and end with the
    process that has them."""

    def __init__(self, form: Form, count: int) -> None:
        self.form, self._count = form, count
        self._workers: list[WorkerProcess] = []
        self._lock = threading.Lock()  # an evaluation may come while the next batch is made

    @property
    def pids(self) -> list[int]:
        """The ids of the running processes."""
        return [worker.process.pid for worker in self._workers]

    def decode(self, items: Sequence[Item]) -> Decoded:
        """As `decoding.decode`. Raises UserError if a process dies."""
        with self._lock:
            if not self._count:
                return decode(items, self.form)
            if not self._workers:
                program = "fsam_trainers.data.images.worker"
                self._workers = [WorkerProcess(program, "decoding", self.form) for _ in range(self._count)]
            ends = np.linspace(0, len(items), self._count + 1).astype(int)
            spans = [(a, b) for a, b in itertools.pairwise(ends) if b > a]
            for worker, (a, b) in zip(self._workers, spans, strict=False):
                worker.give(f"{b - a} images", list(items[a:b]))
            pixels: list[np.ndarray] = []
            reasons: dict[int, str] = {}
            for worker, (a, _) in zip(self._workers, spans, strict=False):
                found: Decoded = worker.answer()
                pixels.append(found.pixels)
                reasons |= {int(a) + i: why for i, why in found.reasons.items()}
        return Decoded(np.concatenate(pixels), reasons)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images as files of a folder, or as rows of a data set.

    read: number -> the path or content of one. name: number -> how messages call it. mark: identifies them all.
    numbers: which of them, int64 [N]. left_out: those that could not be used so far, by number.
    """

    read: Callable[[int], Item]
    name: Callable[[int], str]
    mark: bytes
    numbers: np.ndarray
    labels: np.ndarray
    decoders: Decoders
    left_out: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def digest(self) -> bytes:
        form = repr(tuple(self.decoders.form)).encode()
        return _digest("encoded", self.mark, form, self.numbers, self.labels)

    def pixels(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [int(n) for n in self.numbers[numbers]]
        found = self.decoders.decode([self.read(n) for n in chosen])
        self.seen.update(chosen)
        for place, why in found.reasons.items():
            self._leave_out(chosen[place], why)
        usable = np.ones(len(chosen), bool)
        usable[list(found.reasons)] = False
        return found.pixels, usable

    def part(self, numbers: np.ndarray) -> "Encoded":
        args = (self.numbers[numbers], self.labels[numbers], self.decoders, self.left_out, self.seen)
        return Encoded(self.read, self.name, self.mark, *args)

    def _leave_out(self, number: int, why: str) -> None:
        if number in self.left_out:  # an image is read more than once
            return
        self.left_out[number] = why
        said = f"--data: {self.name(number)} {why}"
        if len(self.left_out) > SKIPPED + len(self.seen) // 100:
            raise UserError(f"{said}; {len(self.left_out)} of the first {len(self.seen)} images cannot be used")
        _log.warning("%s; left out, %s so far", said, len(self.left_out))


def _digest(kind: str, *parts: bytes | np.ndarray) -> bytes:
    digest = hashlib.blake2b(kind.encode(), digest_size=32)
    for part in parts:
        digest.update(hashlib.blake2b(part if isinstance(part, bytes) else np.ascontiguousarray(part).data).digest())
    return digest.digest()
