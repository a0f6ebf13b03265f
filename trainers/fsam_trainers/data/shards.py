"""Token shards that were made elsewhere: raw little-endian .bin files, mapped where they lie."""

import json
from pathlib import Path

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import CHUNK, DTYPES, Corpus, checksum, fingerprint, map_tokens
from fsam_trainers.data.documents import HELD_OUT, reading


def open_shards(path: Path, *, vocab_size: int, max_train: int | None, max_validation: int | None) -> Corpus:
    """The corpus in a .bin file: uint16, or what "dtype" in a meta.json beside it says.

    `train.bin` takes a `validation.bin` beside it as the held-out split; of any other file that is the last twentieth.
    At most `max_train` and `max_validation` tokens of each are used. Raises UserError for a file that is empty, is no
    whole number of tokens, or holds an id of `vocab_size` or more, and for a meta.json that cannot be used.
    """
    with reading(path):
        dtype = _dtype(path.parent / "meta.json")
        train = _map(path, dtype)
        beside = path.parent / "validation.bin"
        if path.name == "train.bin" and beside.is_file():
            validation = _map(beside, dtype)
        else:
            kept = train.size - train.size // HELD_OUT
            train, validation = train[:kept], train[kept:]
        train, validation = train[:max_train], validation[:max_validation]
        for tokens in (train, validation):
            _check_ids(path, tokens, vocab_size)
        mark = fingerprint(vocab_size, dtype, checksum(train), checksum(validation))
    counts = f"{train.size:,} train / {validation.size:,} validation tokens"
    description = f"{path.name}: {counts} ({dtype.name}), vocabulary {vocab_size}"
    return Corpus(train, validation, vocab_size, mark, path.parent, description)


def _dtype(meta: Path) -> np.dtype:
    if not meta.is_file():
        return DTYPES["uint16"]
    try:
        content = json.loads(meta.read_bytes())
    except ValueError as error:
        raise UserError(f'--data: {meta} is not JSON: delete it, or write {{"dtype": "uint16"}} or "uint32"') from error
    name = content.get("dtype", "uint16") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f'--data: {meta} gives the dtype {name!r}: token shards are "uint16" or "uint32"')
    return DTYPES[name]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"--data: {path} is empty")
    if size % dtype.itemsize:
        raise UserError(f"--data: {path} has {size:,} bytes, which is no whole number of {dtype.name} tokens")
    return map_tokens(path, dtype)


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    largest = max((int(tokens[start : start + CHUNK].max()) for start in range(0, tokens.size, CHUNK)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"--data: {path} holds the token id {largest}, --vocab-size is {vocab_size}: "
            f"it must be at least {largest + 1}"
        )
