"""Batches of windows over a token array, as a pure function of (seed, step).

A window is seq_len + 1 tokens (inputs `x[:, :-1]`, labels `x[:, 1:]`); the next one starts at the last token of the one
before, so every token but the first is a label exactly once an epoch. A negative token is one of a prompt: the input
~token, and no target.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import Tokens, check_at_least, check_length

Batch = np.ndarray | dict[str, np.ndarray]
"""Tokens, int32 [B, L + 1], or of images the arrays that `images.batches` describes, each [B, ...]."""


class Order:
    """The rows of each step's batch, as numbers 0 … count − 1: a function of (seed, step) alone.

    Epoch e visits them in a permutation drawn from (seed, e); step s takes positions s·B … (s+1)·B of the epochs'
    permutations laid end to end. A batch larger than an epoch runs on into the following ones.

    rank, ranks, micro_batches: of each micro-batch of a batch only the rank-th of `ranks` equal parts is given.
    Raises UserError if a size is below 1, the seed below 0, or the batch is not cut evenly.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, *, rank: int = 0, ranks: int = 1, micro_batches: int = 1
    ) -> None:
        check_at_least("--batch", batch_size, 1)
        check_at_least("--seed", seed, 0)
        check_rows(batch_size, micro_batches, ranks)
        self.places = np.arange(batch_size).reshape(micro_batches, ranks, -1)[:, rank].ravel()
        self.count, self.batch_size = count, batch_size
        # Two, because a batch may lie across the end of an epoch.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: permutation(seed, (epoch,), count))

    def at(self, step: int, places: np.ndarray | None = None) -> np.ndarray:
        """The numbers of one step, int64; of these places in the batch, by default this rank's."""
        check_at_least("step", step, 0)
        places = self.places if places is None else places
        epochs, offsets = np.divmod(step * self.batch_size + places, self.count)
        chosen = np.empty(places.size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._permutation(int(epoch))[offsets[here]]
        return chosen


class Batches:
    """Training batches in an order that depends on `seed` alone, that of `Order` over the windows.

    There is no state between steps, so a run resumes from its step index.

    tokens: [T] of any integer dtype, ids below 2³¹. sequences: number of windows in an epoch, (T − 1) // seq_len.
    share: as `Order` takes it. Raises UserError if a size does not fit, or T is below seq_len + 1.
    """

    def __init__(self, tokens: Tokens, seq_len: int, batch_size: int, seed: int, **share: int) -> None:
        check_at_least("--seq-len", seq_len, 1)
        check_length("training", tokens.size, seq_len)
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.sequences = (tokens.size - 1) // seq_len
        self._order = Order(self.sequences, batch_size, seed, **share)

    def at(self, step: int) -> np.ndarray:
        """The batch of one step: int32 [batch_size / ranks, seq_len + 1]. Raises UserError for a negative step."""
        return windows_of(self.tokens, self._order.at(step), self.seq_len)

    def state(self, step: int) -> None:
        """What a checkpoint must hold to resume at `step`: nothing."""

    def restore(self, state: Any) -> None:
        """Resume where `state` was taken. Raises UserError if that was a stream."""
        if state is not None:
            raise UserError("--stream: the checkpoint was made with a stream; give the same, or another --out")

    def close(self) -> None:
        """Nothing to do; `StreamedBatches` ends its threads here."""


def check_rows(batch_size: int, micro_batches: int, ranks: int) -> None:
    """Raise UserError if a batch does not divide into micro-batches, or these into equal parts for the ranks."""
    if batch_size % (micro_batches * ranks):
        got = f"--batch {batch_size}"
        raise UserError(f"{got} must be divisible by --micro-batches {micro_batches} times {ranks} processes")


def validation_batches(tokens: Tokens, seq_len: int, batch_size: int, count: int) -> list[np.ndarray]:
    """The first windows of the held-out tokens, always the same: at most `count` arrays, int32 [b, seq_len + 1].

    All arrays have one shape, so a compiled evaluation compiles once: b = batch_size, and windows that do not fill a
    batch are left out; where there are fewer windows than batch_size, one batch of b = their number. Raises UserError
    where a size is below 1, the count below 0, or the tokens fewer than seq_len + 1.
    """
    check_at_least("--seq-len", seq_len, 1)
    check_at_least("--batch", batch_size, 1)
    if count < 0:
        raise UserError(f"the number of validation batches: got {count}, it must be at least 0")
    check_length("validation", tokens.size, seq_len)
    windows = (tokens.size - 1) // seq_len
    size = min(batch_size, windows)
    return [
        windows_of(tokens, np.arange(start, start + size), seq_len)
        for start in range(0, min(count, windows // size) * size, size)
    ]


def each(function: Callable[[np.ndarray], Any], batch: Batch) -> Any:
    """The batch with function(array) in place of each array."""
    return {name: function(x) for name, x in batch.items()} if isinstance(batch, dict) else function(batch)


def named(batch: Any) -> dict[str, Any]:
    """The batch as the Flax models take it: tokens have a name too."""
    return batch if isinstance(batch, dict) else {"tokens": batch}


def rows_of(batch: Batch) -> int:
    """How many rows a batch has."""
    return len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)


def micro_batches_of(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` equal parts."""
    size = rows_of(batch) // count
    return [each(lambda x: x[i * size : (i + 1) * size], batch) for i in range(count)]


def targets_in(batch: Batch) -> float:
    """How many labels of a batch are targets, each by its weight: those that are not negative."""
    if isinstance(batch, dict):
        return float(batch["weights"][batch["labels"] >= 0].sum())
    return int(np.count_nonzero(batch[:, 1:] >= 0))


def mean_over_targets(losses: Sequence[float], counts: Sequence[float]) -> float:
    """The mean over the targets of all batches, from each batch's own and its number of them; 0 if there are none."""
    return float(np.dot(losses, counts)) / max(sum(counts), 1)


def permutation(seed: int, draw: tuple[int, ...], count: int) -> np.ndarray:
    """A permutation of 0 … count − 1, int64 [count], drawn from (seed, draw)."""
    # They go in as a spawn key: as one more word of entropy, (seed, epoch) would equal (seed + epoch·2³², 0).
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=draw))
    return np.random.Generator(bits).permutation(count)


def windows_of(tokens: Tokens, chosen: np.ndarray, seq_len: int) -> np.ndarray:
    """Windows of the numbers `chosen`: int32 [chosen, seq_len + 1]; window i starts at token i · seq_len."""
    places = chosen[:, None] * seq_len + np.arange(seq_len + 1)
    return np.asarray(tokens[places], dtype=np.int32)
