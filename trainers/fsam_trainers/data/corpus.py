"""The corpus that a trainer receives: two memory-mapped token arrays and their description."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsam_core.errors import UserError

CHUNK = 1 << 22  # tokens looked at together where all of a file must be
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus in tokens.

    train: [T] uint16 or uint32, memory-mapped, read-only. Documents end to end, each followed by the end token.
    validation: [V], same dtype; no document, or part of one, is in both.
    vocab_size: number of rows the model's embedding needs; every token id is below it.
    fingerprint: hex digest of the tokens, their dtype and vocab_size: corpora with the same one hold the same tokens.
    folder: where the shards, meta.json and tokenizer.json lie (for a .bin SPEC: the folder of the .bin).
    description: one line for a person.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    fingerprint: str
    folder: Path
    description: str


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of little-endian uint16 and uint32 that holds every id below `vocab_size`."""
    return DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


def map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's tokens, [n] of `dtype`, read-only and not in memory. The size must be a multiple of the item size."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def checksum(tokens: np.ndarray) -> str:
    """blake2b hex digest of the bytes of a 1-D array, read piece by piece."""
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
