"""Batches of windows over a token array, as a pure function of (seed, step).

A window is seq_len + 1 tokens (inputs `x[:, :-1]`, labels `x[:, 1:]`); the next one starts at the last token of the one
before, so every token but the first is a label exactly once an epoch.
"""

from functools import lru_cache

import numpy as np

from fsam_core.errors import UserError

from .corpus import check_at_least, check_length


class Batches:
    """Training batches in an order that depends on `seed` alone.

    Epoch e visits the windows in a permutation drawn from (seed, e); step s takes positions s·B … (s+1)·B of the
    epochs' permutations laid end to end. Nothing is remembered from step to step, so a run resumes from its step index.
    A batch larger than an epoch runs on into the following ones.

    tokens: [T] of any integer dtype, ids below 2³¹. sequences: number of windows in an epoch, (T − 1) // seq_len.
    Raises UserError where a size is below 1, the seed below 0, or T below seq_len + 1.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int) -> None:
        check_at_least("--seq-len", seq_len, 1)
        check_at_least("--batch", batch_size, 1)
        check_at_least("--seed", seed, 0)
        check_length("training", tokens.size, seq_len)
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.sequences = (tokens.size - 1) // seq_len
        # Two, because a batch may lie across the end of an epoch.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: _permutation(seed, epoch, self.sequences))

    def at(self, step: int) -> np.ndarray:
        """The batch of one step: int32 [batch_size, seq_len + 1]. Raises UserError for a negative step."""
        check_at_least("step", step, 0)
        first = step * self.batch_size
        epochs, offsets = np.divmod(np.arange(first, first + self.batch_size), self.sequences)
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._permutation(int(epoch))[offsets[here]]
        return _windows(self.tokens, chosen, self.seq_len)


def validation_batches(tokens: np.ndarray, seq_len: int, batch_size: int, count: int) -> list[np.ndarray]:
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
        _windows(tokens, np.arange(start, start + size), seq_len)
        for start in range(0, min(count, windows // size) * size, size)
    ]


def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # The epoch goes in as a spawn key: as one more word of entropy, (seed, epoch) would equal (seed + epoch·2³², 0).
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.random.Generator(bits).permutation(count)


def _windows(tokens: np.ndarray, chosen: np.ndarray, seq_len: int) -> np.ndarray:
    places = chosen[:, None] * seq_len + np.arange(seq_len + 1)
    return np.asarray(tokens[places], dtype=np.int32)
