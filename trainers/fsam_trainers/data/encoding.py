"""Encodes streams of documents into the two .bin files, in bounded memory."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from fsam_trainers.data.documents import Piece, Split, Stream
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

    def write(self, piece: Piece, ids: list[int], end: int) -> None:
        content = np.array([*ids, end] if piece.ends else ids, self.dtype)[: self.room].tobytes()
        self.file.write(content)
        self._digest.update(content)
        self.tokens += len(content) // self.dtype.itemsize
        self.documents += piece.ends
        self.characters += len(piece.text)


def take_head(stream: Stream, characters: int) -> tuple[list[str], Stream]:
    """The training texts at the start of a stream, about `characters` long in all, and the stream as it was before."""
    head: list[Piece] = []
    seen = 0
    while seen < characters and (piece := next(stream.pieces, None)):
        head.append(piece)
        seen += len(piece.text) if piece.split == "train" else 0
    texts = [piece.text for piece in head if piece.split == "train"]
    return texts, Stream(stream.feeds, chain(head, stream.pieces))


def encode_streams(
    streams: list[Stream], tokenizer: Tokenizer, sinks: dict[Split, Sink], report: Callable[[int], None]
) -> None:
    """Write every stream's tokens, an end token after each document, until the sinks it feeds are full.

    `report` is called now and then with the number of training tokens written.
    """
    for stream in streams:
        fed = [sinks[split] for split in stream.feeds]
        for batch in _batches(stream.pieces, fed):
            wanted = [piece for piece in batch if sinks[piece.split].room != 0]
            encoded = tokenizer.encode([piece.text for piece in wanted], [piece.starts for piece in wanted])
            for piece, ids in zip(wanted, encoded, strict=True):
                if sinks[piece.split].room != 0:
                    sinks[piece.split].write(piece, ids, tokenizer.end)
            report(sinks["train"].tokens)


def encode_rows(
    tokenizer: Tokenizer, texts: list[str], starts: list[bool], ends: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of rows end to end, uint32 [T], the end token after each that `ends`; where rows begin, int64 [rows + 1].

    starts: of each row, whether it starts a document, see `Tokenizer.encode`.
    """
    encoded = tokenizer.encode(texts, starts)
    rows = [[*ids, tokenizer.end] if last else ids for ids, last in zip(encoded, ends, strict=True)]
    places = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(places[-1])), places


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
            characters += len(piece.text)
        if not batch:
            return
        yield batch
