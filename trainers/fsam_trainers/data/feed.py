"""The rows of one part of a sharded text, epoch after epoch, and their tokens, which a thread makes ahead of use."""

import queue
import threading
from collections.abc import Iterator

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.batches import permutation
from fsam_trainers.data.sharded import ShardedText
from fsam_trainers.data.workers import Chunk, Encoded, Place, Workers

CHUNK = 1 << 16  # characters encoded together, about; a single longer row is a chunk of its own
_ROWS = 1 << 10  # rows of a chunk at most: a data set of very short ones
_JOIN_SECONDS = 5.0
_SHARDS = 0  # of the seed's draws: which one is for the order of shards


def assigned(shards: int, seed: int, epoch: int, part: int, parts: int) -> list[tuple[int, int, int]]:
    """What a part reads in an epoch, in order: (shard, which rows, of how many): rows with number ≡ which.

    The epoch's order of shards is drawn from the seed. Whole shards are distributed round-robin as long as every part
    gets one; of those left over, or of all where they are fewer than parts, each part takes every `parts`-th row. So
    the parts are disjoint, together they are everything, and none is much larger than another.
    """
    order = permutation(seed, (_SHARDS, epoch), shards).tolist()
    whole = shards - shards % parts
    return [(shard, 0, 1) for shard in order[part:whole:parts]] + [(shard, part, parts) for shard in order[whole:]]


def chunks(text: ShardedText, seed: int, part: int, parts: int, start: Place) -> Iterator[Chunk]:
    """The training rows of a part from `start` on, epoch after epoch without end; one chunk is in memory at a time.

    Raises UserError if a shard cannot be read, or an epoch has no text.
    """
    epoch, first = start.epoch, start
    while True:
        characters = 0
        for n, (shard, which, of) in enumerate(assigned(len(text.train), seed, epoch, part, parts)):
            if n < first.shard:
                continue
            name = text.train[shard].name
            chunk = Chunk(name, [], [])
            size = 0
            for row in text.train[shard].rows(first.row if n == first.shard else 0, which, of):
                if not text.trains(shard, row.number):
                    continue
                chunk.places.append(Place(epoch, n, row.number))
                chunk.rows.append(row)
                size += len(row.whole)
                if size >= CHUNK or len(chunk.rows) >= _ROWS:
                    yield chunk
                    characters += size
                    chunk, size = Chunk(name, [], []), 0
            if chunk.rows:
                yield chunk
                characters += size
        if not characters and first == Place(epoch, 0, 0):
            share = f" in the share of part {part + 1} of {parts}" if parts > 1 else ""
            raise UserError(f"--data: {text.title} holds no text to train on{share}")
        epoch += 1
        first = Place(epoch, 0, 0)


class Feed:
    """Encoded chunks in order, at most `ahead` of them waiting. Errors of reading and encoding reach `next` at once."""

    def __init__(self, source: Iterator[Chunk], workers: Workers, ahead: int) -> None:
        self._queue: queue.Queue[Encoded] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._workers = workers
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True, name="fsam data")
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        return self._workers.pids

    def check(self) -> None:
        """Raise the error of the thread or of a worker, if there is one."""
        if self._error is not None:
            raise self._error
        self._workers.check()

    def next(self) -> Encoded:
        while True:
            self.check()
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                continue

    def close(self) -> None:
        """End the processes and, unless a shard keeps it waiting, the thread."""
        self._closed.set()
        self._workers.kill()
        self._thread.join(_JOIN_SECONDS)
        # A pipe that is closed under the thread could have its number taken by another file while it is read.
        if not self._thread.is_alive():
            self._workers.close()

    def _run(self, source: Iterator[Chunk]) -> None:
        try:
            for encoded in self._workers.encode(source):
                while not self._closed.is_set():
                    try:
                        self._queue.put(encoded, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._error = error


class Tokens:
    """The tokens of a feed in order, each with its place."""

    def __init__(self, feed: Feed, start: Place) -> None:
        self._feed = feed
        self._start: Place | None = start
        self._chunk: Encoded | None = None
        self._at = 0

    @property
    def place(self) -> Place:
        """The place of the next token."""
        chunk = self._fill()
        row = int(np.searchsorted(chunk.starts, self._at, side="right")) - 1
        return chunk.places[row]._replace(token=self._at - int(chunk.starts[row]))

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens and their successor, with which the next call begins: int32 [count + 1]."""
        taken: list[np.ndarray] = []
        while count:
            chunk = self._fill()
            taken.append(chunk.tokens[self._at : self._at + count])
            self._at += taken[-1].size
            count -= taken[-1].size
        chunk = self._fill()
        return np.concatenate([*taken, chunk.tokens[self._at : self._at + 1]])

    def _fill(self) -> Encoded:
        """The chunk that contains the next token."""
        while self._chunk is None or self._at == self._chunk.tokens.size:
            self._chunk, self._at = self._feed.next(), 0
            if self._start is not None:
                self._skip(self._chunk, self._start)
                self._start = None
        return self._chunk

    def _skip(self, chunk: Encoded, start: Place) -> None:
        """Skip to the start, which is in the first row of the chunk unless the data have changed."""
        if start != Place(0, 0, 0) and (chunk.places[0] != start._replace(token=0) or start.token >= chunk.starts[1]):
            raise UserError(
                f"--data: {chunk.name} is not what it was when the checkpoint was made, at row {start.row + 1}, "
                f"token {start.token + 1}: give the same data, or another --out"
            )
        self._at = start.token
