"""Encodes streams of documents into the two .bin files, in bounded memory."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from fsam_trainers.data.documents import Piece, Row, Split, Stream
from fsam_trainers.data.vocabulary import Tokenizer

_BATCH = 1 << 21  # characters encoded at a time
_SMALL = 1 << 12  # characters read at least, where few tokens are wanted
_PIECES = 1 << 12  # pieces at a time: a data set of very short rows


class Sink:
    """One split's file while it is written, up to `limit` tokens (None: no limit).

    tokens, documents, characters: how much it has taken. checksum: blake2b hex digest of the bytes written.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype, limit: int | None) -> None:
        self.file = file
        self.dtype = dtype
        self.limit = limit
        self.tokens = self.documents = self.characters = 0
        self._digest = hashlib.blake2b(digest_size=32)

    @property
    def room(self) -> int | None:
        """How many more tokens it accepts; None: any number."""
        return None if self.limit is None else self.limit - self.tokens

    @property
    def checksum(self) -> str:
        return self._digest.hexdigest()

    def write(self, row: Row, ids: list[int]) -> None:
        content = np.array(ids, self.dtype)[: self.room].tobytes()
        self.file.write(content)
        self._digest.update(content)
        self.tokens += len(content) // self.dtype.itemsize
        self.documents += row.ends
        self.characters += len(row.whole)


def take_head(stream: Stream, characters: int) -> tuple[list[str], Stream]:
    """The training texts at the start of a stream, about `characters` long in all, and the stream as it was before."""
    head: list[Piece] = []
    seen = 0
    while seen < characters and (piece := next(stream.pieces, None)):
        head.append(piece)
        seen += len(piece.row.whole) if piece.split == "train" else 0
    texts = [piece.row.whole for piece in head if piece.split == "train"]
    return texts, Stream(stream.feeds, chain(head, stream.pieces))


def encode_streams(
    streams: list[Stream], tokenizer: Tokenizer, sinks: dict[Split, Sink], report: Callable[[int], None]
) -> None:
    """Write every stream's tokens, see `encode_rows`, until the sinks it feeds are full.

    `report` is called now and then with the number of training tokens written.
    """
    for stream in streams:
        fed = [sinks[split] for split in stream.feeds]
        for batch in _batches(stream.pieces, fed):
            wanted = [piece for piece in batch if sinks[piece.split].room != 0]
            encoded = encode_rows(tokenizer, [piece.row for piece in wanted])
            for piece, ids in zip(wanted, encoded, strict=True):
                if sinks[piece.split].room != 0:
                    sinks[piece.split].write(piece.row, ids)
            report(sinks["train"].tokens)


def encode_rows(tokenizer: Tokenizer, rows: list[Row]) -> list[list[int]]:
    """The tokens of each row: ~id for each id of its prompt, the ids of its text, and the end token if it `ends`.

    So a negative token is context: the input ~token, and as a label, like every negative one, ignored.
    """
    asked = [row for row in rows if row.prompt]
    prompts = iter(tokenizer.encode([row.prompt or "" for row in asked], [True] * len(asked)))
    encoded = tokenizer.encode([row.text for row in rows], [row.starts and not row.prompt for row in rows])
    for row, ids in zip(rows, encoded, strict=True):
        if row.prompt:
            ids[:0] = [~token for token in next(prompts)]
        if row.ends:
            ids.append(tokenizer.end)
    return encoded


def joined(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of rows end to end, int32 [T], and where each begins, int64 [rows + 1]."""
    places = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(encoded), np.int32, int(places[-1])), places


def _batches(pieces: Iterator[Piece], fed: list[Sink]) -> Iterator[list[Piece]]:
    """Pieces to encode together, until there are no more or all of `fed` are full."""
    while any(sink.room != 0 for sink in fed):
        # Almost every token is at least one character, so this many characters overfill the sinks by little: a stream
        # from the network is not read much further than needed.
        room = sum(_BATCH if sink.room is None else sink.room for sink in fed)
        limit = min(_BATCH, max(_SMALL, room))
        batch: list[Piece] = []
        characters = 0
        while characters < limit and len(batch) < _PIECES and (piece := next(pieces, None)):
            batch.append(piece)
            characters += len(piece.row.whole)
        if not batch:
            return
        yield batch
