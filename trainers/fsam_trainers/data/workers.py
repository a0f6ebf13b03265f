"""Tokenizes chunks of rows in several processes, in order."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from multiprocessing import Pipe
from typing import NamedTuple

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.documents import Row
from fsam_trainers.data.encoding import encode_rows, joined
from fsam_trainers.data.vocabulary import load_tokenizer


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
                yield worker.answer()
            worker.give(chunk)
        for _ in self._workers:
            worker = next(turns)
            if worker.chunk is not None:
                yield worker.answer()

    def check(self) -> None:
        """Raise UserError if a worker has died, busy or not."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                raise worker.death()

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


class _Worker:
    def __init__(self, tokenizer: bytes) -> None:
        self.chunk: Chunk | None = None
        self.last = "nothing yet"
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fsam_trainers.data.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # The processes are the parallelism. They find the same packages as this one.
                env={
                    **os.environ,
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                # A signal to the terminal's group is for the run, which then saves; the worker ends with its pipe.
                start_new_session=True,
            )
        with self._alive():
            self.pipe.send_bytes(tokenizer)

    def give(self, chunk: Chunk) -> None:
        self.chunk, self.last = chunk, chunk.title
        with self._alive():
            self.pipe.send(chunk.rows)

    def answer(self) -> Encoded:
        assert self.chunk is not None
        with self._alive():
            answer = self.pipe.recv()
        if isinstance(answer, str):
            raise UserError(f"--data: {self.chunk.title}: cannot be tokenized: {answer}")
        tokens, starts = answer
        done = Encoded(self.chunk.name, self.chunk.places, tokens, starts)
        self.chunk = None
        return done

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:  # the other end of the pipe is gone
            raise self.death() from error

    def death(self) -> UserError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
        doing = "was at" if self.chunk is not None else "had last done"
        return UserError(
            f"--data: the tokenizing process {self.process.pid} {how}; it {doing} {self.last}: "
            "the same command resumes from the last checkpoint"
        )
