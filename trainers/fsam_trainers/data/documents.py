"""The common output of all text sources: documents in pieces, each with its split, and a digest of the content."""

import hashlib
import importlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, TextIO

from fsam_core.errors import UserError

Split = Literal["train", "validation"]

PIECE = 1 << 17  # characters: long enough that cuts are rare, short enough that a batch of pieces keeps every core busy
LINE = 1 << 14  # characters a piece may grow by to end at the end of a line
HELD_OUT = 20  # one document in this many is held out for validation

_SURROGATE = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """Part of a document, usually all of it. `ends`: it is the last part, after which the end token belongs."""

    split: Split
    text: str
    ends: bool


class Row(NamedTuple):
    """A row of a file, numbered from 0. `ends`: the end token belongs after it."""

    number: int
    text: str
    ends: bool = True


class Stream(NamedTuple):
    """Pieces in order, and the splits they may belong to: when those are full, nothing more is read."""

    feeds: tuple[Split, ...]
    pieces: Iterator[Piece]


@dataclass(frozen=True)
class Source:
    """A text corpus before tokenization.

    title: what it is, for a person. unit: what its documents are ("files", "rows"); empty where counting says nothing.
    digest: hex digest of what the documents are; the same digest means the same documents in the same splits.
    open: starts reading; the first stream feeds the training split.
    """

    title: str
    unit: str
    digest: str
    open: Callable[[], list[Stream]]


def held_out(key: str) -> bool:
    """Whether the document of this name is for validation: one in HELD_OUT, by a hash that is equal everywhere."""
    return rank(key) % HELD_OUT == 0


def rank(key: str) -> int:
    """A 64-bit hash of a name that does not depend on the process (Python's own does)."""
    return int.from_bytes(hashlib.blake2b(_bytes(key), digest_size=8).digest(), "big")


def row_split(index: int) -> Split:
    """The split of row `index` (0, 1, …) of a data set whose length is not known while it is read.

    By hash, but row 0 is always for training and row 1 always held out, so that two rows already fill both splits.
    """
    return "validation" if index == 1 or (index > 1 and held_out(str(index))) else "train"


def row_pieces(texts: Iterable[str], split: Callable[[int], Split]) -> Iterator[Piece]:
    """One document per text; `split` maps its index to its split. Lone surrogates become U+FFFD."""
    for index, text in enumerate(texts):
        text = encodable(text)
        if len(text) <= PIECE:
            yield Piece(split(index), text, ends=True)
        else:
            yield from file_pieces(io.StringIO(text, newline=""), len(text), split(index))


def encodable(text: str) -> str:
    """The text with lone surrogates, which JSON can contain and UTF-8 cannot, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def file_pieces(file: TextIO, count: int, split: Split) -> Iterator[Piece]:
    """The next `count` characters of an open file as one document, in pieces that end with a line where one is near."""
    while True:
        text = file.read(min(PIECE, count))
        text += file.readline(min(LINE, count - len(text)))
        count -= len(text)
        ends = count == 0 or not text
        yield Piece(split, text, ends)
        if ends:
            return


def content_digest(kind: str, parts: Iterable[tuple[str, bytes]]) -> str:
    """Hex digest of a kind of source and its parts: (name, digest of the bytes), in order."""
    digest = hashlib.blake2b(kind.encode(), digest_size=32)
    for name, content in parts:
        for field in (_bytes(name), content):
            digest.update(len(field).to_bytes(8, "big") + field)
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """blake2b digest of a file's bytes. Raises UserError if it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read `path` into a UserError, so that it is not taken for a failure to write the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror or error}") from error


def extra(module: str) -> ModuleType:
    """A module of the optional `data` dependencies; UserError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'--data: needs the package "{module}": pip install "fsam[data]"') from error


def one_line(error: BaseException) -> str:
    """An exception's message in one line of bounded length, for use inside another message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
