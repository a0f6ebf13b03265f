"""The input of a stream: text in shards that are opened one at a time and can be read from any row."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fsam_core.errors import UserError
from fsam_trainers.data import hub
from fsam_trainers.data.documents import HELD_OUT, Row, Split, content_digest, held_out, rank, row_split
from fsam_trainers.data.records import own_validation, record_rows
from fsam_trainers.data.shards import piece_count, text_rows
from fsam_trainers.data.specs import Files, find_files

_OPEN = 8  # shards that a sample is taken from, interleaved


class Reader(Protocol):
    """Rows of a shard from number `start` on whose number is `part` modulo `parts`."""

    def __call__(self, start: int, part: int, parts: int) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that can be read by itself. name: for messages, a path where there is one."""

    name: str
    rows: Reader


@dataclass(frozen=True)
class ShardedText:
    """A corpus in shards.

    title: what it is, for a person. digest: hex digest of the shards' names and sizes.
    train: shards to train on. validation: shards that are held out; None: one in HELD_OUT rows of `train` is, by a hash
    of the shard's and the row's numbers.
    """

    title: str
    digest: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...] | None

    def trains(self, shard: int, row: int) -> bool:
        """Whether this row of `train[shard]` belongs to the training split."""
        return self.validation is not None or _split(shard, row) == "train"

    def sample(self, split: Split) -> Iterator[Row]:
        """Rows of a split, some from each of many shards, always in the same order: shards that a hash of their names
        puts first are read first, a few interleaved. Each row is one document."""
        shards = self.validation if self.validation is not None and split == "validation" else self.train

        def rows(shard: int) -> Iterator[Row]:
            for row in shards[shard].rows(0, 0, 1):
                if self.validation is not None or _split(shard, row.number) == split:
                    yield row._replace(ends=True)

        waiting = sorted(range(len(shards)), key=lambda shard: (rank(shards[shard].name), shard), reverse=True)
        opened: list[Iterator[Row]] = []
        while waiting or opened:
            while waiting and len(opened) < _OPEN:
                opened.append(rows(waiting.pop()))
            for iterator in list(opened):
                if (row := next(iterator, None)) is None:
                    opened.remove(iterator)
                else:
                    yield row


def open_sharded(spec: str) -> ShardedText:
    """The corpus of a SPEC that is "python", a file, a folder or a glob, or starts with "hf:".

    Nothing but names, sizes and, of a hub's data set, its description is read. Raises UserError if there is nothing.
    """
    if spec.startswith("hf:"):
        return _hub(spec)
    files = find_files(spec)
    names = _names(files.paths)
    kind = "rows" if files.rows else "texts"
    parts = [(name, str(path.stat().st_size).encode()) for name, path in zip(names, files.paths, strict=True)]
    return _files(files, content_digest(f"sharded {kind}", parts))


def _split(shard: int, row: int) -> Split:
    # The first shard begins with a row to train on and one held out, so that two rows fill both splits.
    return row_split(row) if shard == 0 else ("validation" if held_out(f"{shard}:{row}") else "train")


def _names(paths: list[Path]) -> list[str]:
    """The paths without their common parents, so that a moved corpus stays the same."""
    shared = 0
    while len({path.parts[:shared] for path in paths}) == 1 and all(len(path.parts) > shared for path in paths):
        shared += 1
    return [Path(*path.parts[shared - 1 :]).as_posix() for path in paths]


def _files(files: Files, digest: str) -> ShardedText:
    if files.rows:
        own, others = own_validation(files.paths)

        def shards(paths: list[Path]) -> tuple[Shard, ...]:
            return tuple(Shard(str(path), partial(record_rows, path)) for path in paths)

        if own and others:
            return ShardedText(files.title, digest, shards(others), shards(own))
        return ShardedText(files.title, digest, shards(files.paths), None)
    full = [path for path in files.paths if path.stat().st_size]
    if not full:
        raise UserError(f"--data: {files.title} holds no text: no file in it has anything in it")
    if len(full) == 1:
        return _one_text(files, digest, full[0])
    # Whole files to one split or the other, as where a folder is stored.
    names = dict(zip(files.paths, _names(files.paths), strict=True))
    chosen = {path for path in full if held_out(names[path])} or {min(full, key=lambda path: rank(names[path]))}
    if len(chosen) == len(full):
        chosen.remove(max(full, key=lambda path: rank(names[path])))

    def shard(path: Path) -> Shard:
        return Shard(str(path), partial(text_rows, path, skip_binary=not files.chosen))

    train = tuple(shard(path) for path in full if path not in chosen)
    return ShardedText(files.title, digest, train, tuple(shard(path) for path in full if path in chosen))


def _one_text(files: Files, digest: str, path: Path) -> ShardedText:
    """The last twentieth of the pieces for validation."""
    count = piece_count(path)
    if count < 2:
        raise UserError(f"--data: {path} is too short to be streamed ({path.stat().st_size:,} bytes): --stream no")
    cut = count - -(-count // HELD_OUT)
    train = Shard(str(path), partial(text_rows, path, last=cut))
    return ShardedText(files.title, digest, (train,), (Shard(str(path), partial(text_rows, path, first=cut)),))


def _hub(spec: str) -> ShardedText:
    opened = hub.load(spec)

    def shards(rows: Any) -> tuple[Shard, ...]:
        count = rows.num_shards
        return tuple(Shard(f"{spec}, shard {n}", partial(hub.shard_rows, spec, rows, n)) for n in range(count))

    train = shards(opened.splits["train"])
    validation = shards(opened.splits["validation"]) if "validation" in opened.splits else None
    counts = f"{len(train)} {0 if validation is None else len(validation)}"
    digest = content_digest("sharded hf", [*opened.parts, ("shards", counts.encode())])
    return ShardedText(opened.title, digest, train, validation)
