"""The corpus that a trainer receives: two memory-mapped token arrays and their description."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsam_core.errors import UserError

CHUNK = 1 << 22  # tokens looked at together where all of a file must be
DTYPES: dict[str, np.dtype] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}


class JoinedTokens:
    """Token arrays of one dtype end to end, indexed like one [T]. Only what is taken out by an array is copied."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *(part.size for part in parts)])
        self.dtype, self.size = parts[0].dtype, int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """A slice of step 1 is joined tokens again; an integer array gives an array of its shape."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.size)
            spans = zip(self.parts, self._starts.tolist(), strict=False)
            return JoinedTokens([part[max(start - at, 0) : max(stop - at, 0)] for part, at in spans])
        which = np.searchsorted(self._starts, index, side="right") - 1
        taken = np.empty(index.shape, self.dtype)
        for number in np.unique(which):
            here = which == number
            taken[here] = self.parts[number][index[here] - self._starts[number]]
        return taken

    def tobytes(self) -> bytes:
        return b"".join(part.tobytes() for part in self.parts)


Tokens = np.ndarray | JoinedTokens


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus in tokens.

    train: [T] of one of DTYPES, memory-mapped, read-only. Documents end to end, each followed by the end token. The
        tokens of prompts are ~id, see `encode_rows`.
    validation: [V], same dtype; no document, or part of one, is in both.
    vocab_size: number of rows the model's embedding needs; every token id is below it.
    fingerprint: hex digest of the tokens, their dtype and vocab_size: corpora with the same one hold the same tokens.
    folder: where the tokens, meta.json and the tokenizer lie (of files of tokens: the folder of the first).
    description: one line for a person.
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    fingerprint: str
    folder: Path
    description: str


def dtype_for(vocab_size: int, *, prompts: bool) -> np.dtype:
    """The narrower of uint16 and uint32 that holds every id below `vocab_size`; int32 if there are prompts' too."""
    return DTYPES["int32" if prompts else "uint16" if vocab_size <= 1 << 16 else "uint32"]


def map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's tokens, [n] of `dtype`, read-only and not in memory. The size must be a multiple of the item size."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def checksum(tokens: Tokens) -> str:
    """blake2b hex digest of the bytes of the tokens, read piece by piece."""
    digest = hashlib.blake2b(digest_size=32)
    for start in range(0, tokens.size, CHUNK):
        digest.update(tokens[start : start + CHUNK].tobytes())
    return digest.hexdigest()


def fingerprint(vocab_size: int, dtype: np.dtype, train: str, validation: str) -> str:
    """The corpus's fingerprint, from the checksums of its two splits.

    It covers the tokens and not only the recipe, so a data set that changed on its hub, or a tokenizer library that
    learns other merges, shows.
    """
    text = f"fsam corpus 1|{vocab_size}|{dtype.name}|{train}|{validation}"
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def check_length(name: str, tokens: int, seq_len: int) -> None:
    """Raise UserError if the split called `name`, of `tokens` tokens, does not fill one window of seq_len + 1."""
    if tokens < seq_len + 1:
        raise UserError(
            f"--data: the {name} split has {tokens:,} tokens, one sequence needs seq_len + 1 = {seq_len + 1}: "
            "give more text or a smaller --seq-len"
        )


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise UserError if `value`, given as `flag`, is below `least`."""
    if value < least:
        raise UserError(f"{flag}: got {value}, it must be at least {least}")
