"""What all sources share: rows and pieces of documents, what is held out, digests, and errors of reading."""

import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from fsam_core import backends
from fsam_core.errors import UserError

Split = Literal["train", "validation"]
Columns = tuple[tuple[str, ...], ...]
"""Where a row's document is: the first of these that it has, a column of text or those of a prompt and its answer."""

HELD_OUT = 20  # one document in this many is held out for validation

_SURROGATE = re.compile("[\ud800-\udfff]")
_VALIDATION = re.compile(r"validation|(?<![a-z])val(id)?(?![a-z])")


class Row(NamedTuple):
    """A row of a file, numbered from 0: a document, or the part of one that `starts` and `ends` say.

    ends: it is the last part, after which the end token belongs. prompt: context before the text, on whose tokens no
    model is trained; None of a row of text alone.
    """

    number: int
    text: str
    ends: bool = True
    starts: bool = True
    prompt: str | None = None

    @property
    def whole(self) -> str:
        """The text, after its prompt if it has one."""
        return (self.prompt or "") + self.text


class Piece(NamedTuple):
    """A row and the split that it belongs to."""

    split: Split
    row: Row


class Stream(NamedTuple):
    """Pieces in order, and the splits they may belong to: when those are full, nothing more is read."""

    feeds: tuple[Split, ...]
    pieces: Iterator[Piece]


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


def named_splits(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """(files to train on, files whose names say "validation" or "val"); the latter are [] if there are no others."""
    own = [path for path in paths if _VALIDATION.search(path.name.lower())]
    others = [path for path in paths if path not in own]
    return (others, own) if own and others else (paths, [])


def encodable(text: str) -> str:
    """The text with lone surrogates, which JSON can contain and UTF-8 cannot, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


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
    """A module of the optional `data` dependencies. Raises UserError with a pip command if it is missing or broken."""
    try:
        backends.require(module)
    except UserError as error:
        raise UserError(f"--data: {error}") from error
    return importlib.import_module(module)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
