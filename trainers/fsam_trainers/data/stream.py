"""Batches of a corpus whose training tokens are made while they are used.

They are shuffled in a bounded buffer, in parts that ranks share, and resume at the exact token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.batches import check_rows, permutation, windows_of
from fsam_trainers.data.corpus import check_at_least
from fsam_trainers.data.feed import CHUNK, Feed, Tokens, chunks
from fsam_trainers.data.pipeline import CHARACTERS_PER_TOKEN
from fsam_trainers.data.sharded import ShardedText
from fsam_trainers.data.workers import Place, Workers

_WINDOWS = 1  # of the seed's draws: which one is for the order within a buffer (0: of shards, see `feed`)


@dataclass(frozen=True)
class Recipe:
    """What determines the order of a stream's tokens, together with the number of parts.

    text: the shards. tokenizer: its file's content. buffer: windows that are shuffled together.
    Raises UserError if a size does not fit.
    """

    text: ShardedText
    tokenizer: bytes
    seq_len: int
    seed: int
    buffer: int

    def __post_init__(self) -> None:
        check_at_least("--seq-len", self.seq_len, 1)
        check_at_least("--seed", self.seed, 0)
        check_at_least("--shuffle-buffer", self.buffer, 1)


class StreamedBatches:
    """Training batches of this rank, one step after the other.

    The rows are distributed over as many parts as there are ranks when a run starts. Each part's documents, one epoch
    after the other, are one sequence of tokens; its windows of seq_len + 1 tokens (overlapping by one) are shuffled
    within buffers of `buffer` windows. Each micro-batch is the same number of windows from each part, parts in order,
    of which a rank has its own. So the batches of all ranks together depend on (data, tokenizer, seed, parts, buffer,
    micro_batches) and not on how many ranks or workers make them; any number of ranks that divides the parts resumes.

    Raises UserError if a size does not fit, and from `at` where a shard cannot be read or a worker dies.
    """

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        workers: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        micro_batches: int = 1,
    ) -> None:
        check_at_least("--batch", batch_size, 1)
        check_at_least("--data-workers", workers, 0)
        self._recipe, self._batch_size, self._workers = recipe, batch_size, workers
        self._rank, self._ranks, self._micro = rank, ranks, micro_batches
        self._index = 0
        self._last: tuple[int, np.ndarray, dict[str, Any]] | None = None
        self._of = 0
        self._parts: dict[int, _Part] = {}
        self._share(ranks, {})

    @property
    def pids(self) -> list[int]:
        """The ids of the running tokenizing processes."""
        return [pid for part in self._parts.values() for pid in part.pids]

    def at(self, index: int) -> np.ndarray:
        """The batch of step `index`: int32 [batch_size / ranks, seq_len + 1].

        Steps come in order; the step last asked for may be asked for again. Raises UserError for any other.
        """
        for part in self._parts.values():
            part.check()
        if self._last is not None and index == self._last[0]:
            return self._last[1]
        if index != self._index:
            raise UserError(f"step: a stream is at step {self._index} and goes forward one by one, got {index}")
        before = self.state(index)
        each = self._batch_size // self._of
        taken = [part.take(each).reshape(self._micro, each // self._micro, -1) for part in self._parts.values()]
        batch = np.concatenate(taken, axis=1).reshape(each * len(taken), -1)
        self._last = index, batch, before
        self._index += 1
        return batch

    def state(self, index: int) -> dict[str, Any]:
        """What `restore` needs to resume at step `index`, which is the next one or the one last asked for.

        Plain values: {"index", "of", "buffer", "parts": {part: {"epoch", "shard", "row", "token", "block", "used"}}}, a
        hundred bytes a part of this rank's. `merged` puts those of all ranks together.
        """
        if self._last is not None and index == self._last[0]:
            return self._last[2]
        if index != self._index:
            raise UserError(f"step: the state of a stream at step {self._index} was asked for step {index}")
        parts = {str(number): part.state() for number, part in self._parts.items()}
        return {"index": index, "of": self._of, "buffer": self._recipe.buffer, "parts": parts}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume where `state`, that of all ranks, was taken. Raises UserError if buffer or ranks do not fit."""
        if state is None:
            raise UserError("--stream: the checkpoint was made without it; give the same, or another --out")
        if state["buffer"] != (mine := self._recipe.buffer):
            raise UserError(f"--shuffle-buffer: got {mine}, the checkpoint was made with {state['buffer']}: give that")
        self.close()
        self._share(state["of"], state["parts"])
        self._index, self._last = state["index"], None

    def close(self) -> None:
        """End the threads and processes."""
        for part in self._parts.values():
            part.close()

    def _share(self, of: int, states: dict[str, dict[str, int]]) -> None:
        """Make this rank's parts, of `of` parts in all, at their `states` if there are any."""
        if of % self._ranks:
            raise UserError(
                f"--stream: the run's data are in {of} parts, which {self._ranks} ranks cannot share out evenly: "
                "give a number of ranks that divides it"
            )
        check_rows(self._batch_size, self._micro, of)
        each = of // self._ranks
        mine = range(self._rank * each, (self._rank + 1) * each)
        if states and (missing := [number for number in mine if str(number) not in states]):
            raise UserError(
                f"--stream: the checkpoint lacks the state of parts {missing} of {of}: was it made by one rank alone?"
            )
        workers = -(-self._workers // each)  # where a rank has any, each of its parts has one
        self._of = of
        self._parts = {n: _Part(self._recipe, workers, n, of, states.get(str(n), {})) for n in mine}


def merged(states: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The ranks' `state`s of one step as one state; None if they are None."""
    found = [state for state in states if state is not None]
    if not found:
        return None
    return {**found[0], "parts": {number: part for state in found for number, part in state["parts"].items()}}


class _Part:
    """The windows of one part. Nothing is read before the first `take`."""

    def __init__(self, recipe: Recipe, workers: int, number: int, of: int, state: dict[str, int]) -> None:
        self._recipe, self._count = recipe, workers
        self._number, self._of = number, of
        self._start = Place(*(state.get(name, 0) for name in Place._fields))
        self._block, self._used = state.get("block", 0), state.get("used", 0)
        self._feed: Feed | None = None
        self._tokens: Tokens | None = None
        self._buffered: np.ndarray | None = None  # int32 [buffer · seq_len + 1]
        self._order = np.zeros(0, np.int64)

    @property
    def pids(self) -> list[int]:
        return [] if self._feed is None else self._feed.pids

    def take(self, count: int) -> np.ndarray:
        """The next windows, int32 [count, seq_len + 1]."""
        taken = []
        while count:
            if self._buffered is None or self._used == self._recipe.buffer:
                self._fill()
            assert self._buffered is not None
            chosen = self._order[self._used : self._used + count]
            taken.append(windows_of(self._buffered, chosen, self._recipe.seq_len))
            self._used += chosen.size
            count -= chosen.size
        return np.concatenate(taken)

    def state(self) -> dict[str, int]:
        return {**self._start._asdict(), "block": self._block, "used": self._used}

    def check(self) -> None:
        if self._feed is not None:
            self._feed.check()

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()

    def _fill(self) -> None:
        """Make the next buffer; the first one is that of the state."""
        recipe = self._recipe
        size = recipe.buffer * recipe.seq_len
        if self._tokens is None:
            # The next buffer is made while this one is used.
            ahead = max(2, -(-size * CHARACTERS_PER_TOKEN // CHUNK))
            source = chunks(recipe.text, recipe.seed, self._number, self._of, self._start)
            self._feed = Feed(source, Workers(recipe.tokenizer, self._count), ahead)
            self._tokens = Tokens(self._feed, self._start)
        if self._buffered is not None:
            self._block, self._used = self._block + 1, 0
        self._start = self._tokens.place
        self._buffered = self._tokens.take(size)
        self._order = permutation(recipe.seed, (_WINDOWS, self._number, self._block), recipe.buffer)
