"""Batches of images: a dictionary of arrays with B rows.

pixels   uint8 [B, H, W, C]
labels   int32 [B, K]     K = 1, with mixup 2; negative where an image cannot be used
weights  float32 [B, K]   of each label in the loss; they sum to 1 an image
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, overload

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.batches import Order
from fsam_trainers.data.images.augmentation import Augmentation
from fsam_trainers.data.images.sources import IGNORED, Source

Images = dict[str, np.ndarray]


class ImageBatches:
    """Training batches of this rank; the position in the data is the step index alone, as in `data.Batches`.

    The next step's batch is made in a thread while this one's is used. Raises UserError as `Order` does, and from `at`
    where images cannot be read or a worker dies.
    """

    def __init__(self, source: Source, augmentation: Augmentation, batch_size: int, seed: int, **share: int) -> None:
        self._source, self._augmentation, self._seed = source, augmentation, seed
        self._order = Order(len(source.labels), batch_size, seed, **share)
        self._thread = ThreadPoolExecutor(1, "fsam images")
        self._ahead: dict[int, Future[Images]] = {}

    def at(self, step: int) -> Images:
        """The batch of one step; any step may be asked for."""
        wanted = (step, step + 1)
        self._ahead = {n: x for n, x in self._ahead.items() if n in wanted}
        for n in wanted:
            if n not in self._ahead:
                self._ahead[n] = self._thread.submit(self._made, n)
        return self._ahead[step].result()

    def state(self, step: int) -> None:
        """What a checkpoint must hold to resume at `step`: nothing."""

    def restore(self, state: Any) -> None:
        """Resume where `state` was taken. Raises UserError if that was a stream of text."""
        if state is not None:
            raise UserError("--task: the checkpoint was made with a stream of text; give another --out")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _made(self, step: int) -> Images:
        own_R, size = self._order.places, self._order.batch_size
        if not self._augmentation.mixup:
            pixels, labels_R = self._augmented(step, own_R)
            return images(pixels, labels_R[:, None])
        # The partners are rows of the same batch: most are this rank's own.
        other_R = self._augmentation.partners(own_R, size)
        every = np.union1d(own_R, other_R)
        pixels, labels = self._augmented(step, every)
        own, other = (np.searchsorted(every, places) for places in (own_R, other_R))
        draws = self._augmentation.draws(self._seed, step, size, own_R)
        mixed = draws.mixed(pixels[own], pixels[other])
        weights_Rx2 = np.stack([draws.shares_R, 1 - draws.shares_R], axis=1)
        return images(mixed, np.stack([labels[own], labels[other]], axis=1), weights_Rx2)

    def _augmented(self, step: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, labels) of these places of a step's batch, before they are mixed."""
        pixels, labels = read(self._source, self._order.at(step, places))
        return self._augmentation.draws(self._seed, step, self._order.batch_size, places).moved(pixels), labels


class HeldOut(Sequence[Images]):
    """All images of a source in batches of `batch_size`, the last one ragged; decoded whenever they are asked for."""

    def __init__(self, source: Source, batch_size: int) -> None:
        self._source, self._size = source, batch_size

    def __len__(self) -> int:
        return -(-len(self._source.labels) // self._size)

    @overload
    def __getitem__(self, index: int) -> Images: ...
    @overload
    def __getitem__(self, index: slice) -> list[Images]: ...
    def __getitem__(self, index: int | slice) -> Images | list[Images]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._size
        pixels, labels = read(self._source, np.arange(start, min(start + self._size, len(self._source.labels))))
        return images(pixels, labels[:, None])

    def __iter__(self) -> Iterator[Images]:
        return (self[i] for i in range(len(self)))


def read(source: Source, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, labels) of these images; the label of one that cannot be used is negative."""
    pixels, usable = source.pixels(numbers)
    return pixels, np.where(usable, source.labels[numbers], IGNORED).astype(np.int32)


def images(pixels: np.ndarray, labels_BxK: np.ndarray, weights_BxK: np.ndarray | None = None) -> Images:
    """A batch of these arrays; weights None for 1."""
    weights_BxK = np.ones(labels_BxK.shape, np.float32) if weights_BxK is None else weights_BxK
    return {"pixels": np.ascontiguousarray(pixels), "labels": labels_BxK, "weights": weights_BxK.astype(np.float32)}
