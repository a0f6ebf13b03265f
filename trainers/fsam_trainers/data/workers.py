"""Tokenizes chunks of rows in several processes, in order."""

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.documents import Row
from fsam_trainers.data.encoding import encode_rows, joined
from fsam_trainers.data.vocabulary import load_tokenizer
from fsam_trainers.data.worker_process import WorkerProcess


class Place(NamedTuple):
    """Where a token stands in a part of a stream: the shard is the n-th of the part's shards in that epoch."""

    epoch: int
    shard: int
    row: int
    token: int = 0


class Chunk(NamedTuple):
    """Rows to encode together, each with its place. name: of the shard."""

    name: str
    places: list[Place]
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.name}, from row {self.places[0].row + 1} on"


class Encoded(NamedTuple):
    """A chunk's tokens, int32 [T]; row r of `places` is tokens[starts[r] : starts[r + 1]]."""

    name: str
    places: list[Place]
    tokens: np.ndarray
    starts: np.ndarray


class Workers:
    """`count` processes that encode; with 0 the calling one does. The order of chunks does not depend on `count`."""

    def __init__(self, tokenizer: bytes, count: int) -> None:
        self._tokenizer = tokenizer
        self._workers = [_Worker(tokenizer) for _ in range(count)]

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        """The chunks' tokens. `chunks` is read one chunk a worker ahead. Raises UserError if a worker dies."""
        if not self._workers:
            tokenizer = load_tokenizer(self._tokenizer, None, 1 << 31)
            for chunk in chunks:
                yield Encoded(chunk.name, chunk.places, *joined(encode_rows(tokenizer, chunk.rows)))
            return
        # A worker has one chunk, and its answer is read before it gets the next one. So neither side of a pipe waits
        # for the other to read, and answers come in the order of the chunks.
        turns = cycle(self._workers)
        for chunk in chunks:
            worker = next(turns)
            if worker.chunk is not None:
                yield worker.encoded()
            worker.encode(chunk)
        for _ in self._workers:
            worker = next(turns)
            if worker.chunk is not None:
                yield worker.encoded()

    def check(self) -> None:
        """Raise UserError if a worker has died, busy or not."""
        for worker in self._workers:
            worker.check()

    def kill(self) -> None:
        """End the processes: whoever waits for an answer gets a UserError."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def close(self) -> None:
        """Close the pipes, when nobody waits for an answer any more."""
        for worker in self._workers:
            worker.pipe.close()


class _Worker(WorkerProcess):
    """A tokenizing process and the chunk that it has."""

    def __init__(self, tokenizer: bytes) -> None:
        super().__init__("fsam_trainers.data.worker", "tokenizing", tokenizer)
        self.chunk: Chunk | None = None

    def encode(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.give(chunk.title, chunk.rows)

    def encoded(self) -> Encoded:
        assert self.chunk is not None
        answer = self.answer()
        if isinstance(answer, str):
            raise UserError(f"--data: {self.chunk.title}: cannot be tokenized: {answer}")
        tokens, starts = answer
        done = Encoded(self.chunk.name, self.chunk.places, tokens, starts)
        self.chunk = None
        return done
