"""Files read in parts: .bin files of tokens, mapped where they lie, and text files in pieces cut at line ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import CHUNK, DTYPES, Corpus, checksum, fingerprint, map_tokens
from fsam_trainers.data.documents import HELD_OUT, Row, reading

PIECE = 1 << 14  # bytes of a text file
REACH = 1 << 12  # bytes a piece may grow by to end with a line


def open_shards(path: Path, *, vocab_size: int, max_train: int | None, max_validation: int | None) -> Corpus:
    """The corpus in a .bin file: uint16, or the "dtype" of a meta.json in its folder.

    A `validation.bin` next to `train.bin` is the held-out split; of any other file it is the last twentieth.
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


# --- text in pieces ---------------------------------------------------------------------------------------------------


def piece_count(path: Path) -> int:
    """The number of a file's pieces, which depends on its size only."""
    with reading(path):
        return -(-path.stat().st_size // PIECE)


def text_rows(
    path: Path, start: int, part: int, parts: int, *, first: int = 0, last: int | None = None, skip_binary: bool = False
) -> Iterator[Row]:
    """Pieces first … last of a file, from number `start` on (counted from `first`) with number ≡ part (mod parts).

    Together the pieces are the file. The last one ends a document; so does each if they are distributed over several
    parts, because the text that follows it is then another one. Raises UserError if the file is not UTF-8;
    with skip_binary one that does not start like text gives no rows instead.
    """
    count = (piece_count(path) if last is None else last) - first
    with reading(path), path.open("rb") as file:
        if count <= 0 or (skip_binary and not _looks_like_text(file)):
            return
        for number in range(start + (part - start) % parts, count, parts):
            begin, end = (_boundary(file, (first + piece) * PIECE) for piece in (number, number + 1))
            file.seek(begin)
            content = file.read(end - begin)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"--data: {path} is not UTF-8 text: byte {begin + error.start} is {content[error.start]:#04x}"
                ) from error
            yield Row(number, text, ends=parts > 1 or number == count - 1)


def _boundary(file: BinaryIO, mark: int) -> int:
    """The start of the piece near byte `mark`: after the next line end in reach, else at a character."""
    if mark == 0:
        return 0
    file.seek(mark - 1)
    window = file.read(REACH)
    line = window.find(b"\n")
    if line >= 0:
        return mark + line
    inside = 1
    while inside < len(window) and window[inside] & 0xC0 == 0x80:  # a character's second, third or fourth byte
        inside += 1
    return mark - 1 + min(inside, len(window))


def _looks_like_text(file: BinaryIO) -> bool:
    content = file.read(1 << 13)
    if b"\0" in content:
        return False
    for cut in range(min(4, len(content) + 1)):  # the last character may be incomplete
        try:
            content[: len(content) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return True
    return False
