"""A corpus of text in shards that are opened one at a time and can be read from any row: stored and streamed alike."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from fsam_trainers.data import hub
from fsam_trainers.data.documents import (
    Columns,
    Piece,
    Row,
    Split,
    Stream,
    content_digest,
    held_out,
    named_splits,
    rank,
    row_split,
)
from fsam_trainers.data.records import COLUMNS, Skipped, record_rows
from fsam_trainers.data.specs import Files, find_files, is_hub
from fsam_trainers.data.text import held_out_from, text_rows

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
    unit: what the documents are ("files", "rows"); "" where counting says nothing. skipped: rows without a text.
    prompts: whether the documents are prompts with answers.
    """

    title: str
    digest: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...] | None
    unit: str = "rows"
    skipped: Skipped = field(default_factory=Skipped)
    prompts: bool = False

    def trains(self, shard: int, row: int) -> bool:
        """Whether this row of `train[shard]` belongs to the training split."""
        return self.validation is not None or _split(shard, row) == "train"

    def streams(self) -> list[Stream]:
        """All documents, shard after shard; the first stream contains those of the training split."""

        def pieces(shards: tuple[Shard, ...], split: Split | None) -> Iterator[Piece]:
            for number, shard in enumerate(shards):
                for row in shard.rows(0, 0, 1):
                    yield Piece(split or _split(number, row.number), row)

        if self.validation is None:
            return [Stream(("train", "validation"), pieces(self.train, None))]
        held = Stream(("validation",), pieces(self.validation, "validation"))
        return [Stream(("train",), pieces(self.train, "train")), held]

    def sample(self, split: Split) -> Iterator[Row]:
        """Documents of a split from each of many shards, always in the same order: shards that a hash of their names
        puts first are read first, a few interleaved. The rows of a document stay together, but for those to train on:
        a vocabulary can be learned from parts, and of more documents."""
        shards = self.validation if self.validation is not None and split == "validation" else self.train

        def rows(shard: int) -> Iterator[Row]:
            for row in shards[shard].rows(0, 0, 1):
                if self.validation is not None or _split(shard, row.number) == split:
                    yield row

        waiting = sorted(range(len(shards)), key=lambda shard: (rank(shards[shard].name), shard), reverse=True)
        opened: list[Iterator[Row]] = []
        while waiting or opened:
            while waiting and len(opened) < _OPEN:
                opened.append(rows(waiting.pop()))
            for iterator in list(opened):
                for row in iterator:
                    yield row
                    if row.ends or split == "train":
                        break
                else:
                    opened.remove(iterator)


def open_sharded(spec: str, columns: Columns = COLUMNS, files: Files | None = None) -> ShardedText:
    """The corpus of a SPEC that is "python", a file, a folder or a glob of text or rows, or starts with "hf:".

    Nothing but names, sizes, beginnings, the first row and, of a hub's data set, its description is read. columns:
    where a row's document is. files: those that `find_files` found. Raises UserError if there is nothing.
    """
    if is_hub(spec):
        return _hub(spec, columns)
    files = files or find_files(spec, columns)
    parts = [
        (name, str(path.stat().st_size).encode()) for name, path in zip(_names(files.paths), files.paths, strict=True)
    ]
    # Other columns hold another text.
    kind = files.kind if files.kind == "text" or columns == COLUMNS else f"rows {','.join(columns[0])}"
    return (
        _rows(files, content_digest(f"sharded {kind}", parts), columns)
        if files.kind == "rows"
        else _texts(files, content_digest(f"sharded {kind}", parts))
    )


def _split(shard: int, row: int) -> Split:
    # The first shard begins with a row to train on and one held out, so that two rows fill both splits.
    return row_split(row) if shard == 0 else ("validation" if held_out(f"{shard}:{row}") else "train")


def _names(paths: list[Path]) -> list[str]:
    """The paths without their common parents, so that a moved corpus stays the same."""
    shared = 0
    while len({path.parts[:shared] for path in paths}) == 1 and all(len(path.parts) > shared for path in paths):
        shared += 1
    return [Path(*path.parts[shared - 1 :]).as_posix() for path in paths]


def _settled(columns: Columns, rows: Iterable[Row]) -> Columns:
    """Those of the columns that have the form of the first row: a corpus is texts alone, or prompts with answers."""
    first = next(iter(rows), None) if len(columns) > 1 else None
    return tuple(names for names in columns if first is None or (len(names) > 1) == (first.prompt is not None))


def _rows(files: Files, digest: str, columns: Columns) -> ShardedText:
    skipped = Skipped()
    train_paths, own_paths = named_splits(files.paths)
    columns = _settled(columns, chain.from_iterable(record_rows(path, columns=columns) for path in train_paths))
    train, own = (
        tuple(Shard(str(path), partial(record_rows, path, columns=columns, skipped=skipped)) for path in paths)
        for paths in (train_paths, own_paths)
    )
    return ShardedText(files.title, digest, train, own or None, skipped=skipped, prompts=len(columns[0]) > 1)


def _texts(files: Files, digest: str) -> ShardedText:
    """Whole files to one split or the other, by a hash of the name; of a single one the end is held out."""

    def shard(path: Path, **span: int) -> Shard:
        return Shard(str(path), partial(text_rows, path, **span))

    if len(files.paths) == 1:
        (path,) = files.paths
        cut = held_out_from(path)
        return ShardedText(files.title, digest, (shard(path, end=cut),), (shard(path, begin=cut),), unit="")
    names = dict(zip(files.paths, _names(files.paths), strict=True))
    by_rank = sorted(files.paths, key=lambda path: rank(names[path]))
    chosen = {path for path in by_rank if held_out(names[path])} or {by_rank[0]}
    if len(chosen) == len(by_rank):
        chosen.remove(by_rank[-1])
    train, validation = (tuple(shard(p) for p in files.paths if (p in chosen) == held) for held in (False, True))
    return ShardedText(files.title, digest, train, validation, unit="files")


def _hub(spec: str, columns: Columns) -> ShardedText:
    opened = hub.load(spec)
    skipped = Skipped()
    split = opened.splits["train"]
    look = (hub.shard_rows(spec, split, n, columns, Skipped(), 0, 0, 1) for n in range(split.num_shards))
    columns = _settled(columns, chain.from_iterable(look))

    def shards(split: Any) -> tuple[Shard, ...]:
        rows = range(split.num_shards)
        return tuple(
            Shard(f"{spec}, shard {n}", partial(hub.shard_rows, spec, split, n, columns, skipped)) for n in rows
        )

    train = shards(opened.splits["train"])
    validation = shards(opened.splits["validation"]) if "validation" in opened.splits else None
    names = " ".join(map(",".join, columns))
    counts = f"{len(train)} {0 if validation is None else len(validation)} {names}"
    parts = hub.identity(spec, lambda path: str(path.stat().st_size).encode())
    digest = content_digest("sharded hf", [*parts, ("shards", counts.encode())])
    return ShardedText(opened.title, digest, train, validation, skipped=skipped, prompts=len(columns[0]) > 1)
