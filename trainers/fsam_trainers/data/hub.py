"""Data sets of the Hugging Face hub, or local folders that `datasets` can load, streamed: hf:NAME or hf:NAME:CONFIG."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError
from fsam_trainers.data.documents import (
    Row,
    Source,
    Stream,
    content_digest,
    extra,
    file_digest,
    one_line,
    row_pieces,
    row_split,
)

_DEFAULT_CONFIG = {"allenai/c4": "en"}


class Opened(NamedTuple):
    """A data set that `datasets` streams: its splits by name, "train" among them; `parts` identify it in a digest."""

    title: str
    parts: list[tuple[str, bytes]]
    splits: dict[str, Any]


def hub_source(spec: str, max_tokens: int | None) -> Source:
    """The data set of a SPEC that starts with "hf:".

    Its own validation split is used where it has one, else rows are held out by a hash of their number. Raises
    UserError without `max_tokens`, and, when opened, for a data set that cannot be reached or has no `text` column.
    """
    if max_tokens is None:
        raise UserError(
            f"--data {spec}: to be stored, a data set of the hub needs --max-tokens N; --stream yes needs none"
        )
    name, config = _parse(spec)
    parts = _parts(name, config, file_digest)
    return Source(_title(name, config), "rows", content_digest("hf", parts), lambda: _streams(spec))


def load(spec: str) -> Opened:
    """The data set of a SPEC, opened for streaming. Raises UserError if it cannot be, or has no train split."""
    name, config = _parse(spec)
    datasets = extra("datasets")
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # the hub client lets the errors of half a dozen libraries through
        raise UserError(f"--data {spec}: the data set cannot be opened: {one_line(error)}") from error
    if "train" not in splits:
        raise UserError(f'--data {spec}: the data set has no "train" split, only: {", ".join(splits)}')
    parts = _parts(name, config, lambda path: str(path.stat().st_size).encode())
    return Opened(_title(name, config), parts, dict(splits))


def shard_rows(spec: str, split: Any, shard: int, start: int, part: int, parts: int) -> Iterator[Row]:
    """Rows of one shard of a split, from number `start` on, with number ≡ part (mod parts).

    Raises UserError if the shard cannot be read or has no `text` column.
    """
    place = f"{spec}, shard {shard}"
    with _reading(place):
        rows = split.shard(num_shards=split.num_shards, index=shard)
        for number, row in enumerate(rows.skip(start) if start else rows, start):
            if number % parts == part:
                yield Row(number, _text_of(row, place))


def _parse(spec: str) -> tuple[str, str | None]:
    rest = spec.removeprefix("hf:")
    name, _, config = (rest, "", "") if Path(rest).is_dir() else rest.partition(":")
    if not name:
        raise UserError(f"--data {spec}: no data set named: write hf:NAME or hf:NAME:CONFIG, such as hf:allenai/c4")
    return name, config or _DEFAULT_CONFIG.get(name)


def _title(name: str, config: str | None) -> str:
    return f"{name} ({config})" if config else name


def _parts(name: str, config: str | None, look: Callable[[Path], bytes]) -> list[tuple[str, bytes]]:
    """What identifies a data set.

    One of the hub by its name: asking for its revision would need the network even when all is in the cache. A local
    folder can be looked at.
    """
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [(name, b""), (config or "", b""), *((path.relative_to(folder).as_posix(), look(path)) for path in files)]


def _streams(spec: str) -> list[Stream]:
    splits = load(spec).splits
    if "validation" not in splits:
        return [Stream(("train", "validation"), row_pieces(_texts(spec, splits["train"]), row_split))]
    return [
        Stream(("train",), row_pieces(_texts(spec, splits["train"]), lambda _: "train")),
        Stream(("validation",), row_pieces(_texts(spec, splits["validation"]), lambda _: "validation")),
    ]


def _texts(spec: str, rows: Any) -> Iterator[str]:
    with _reading(spec):
        for row in rows:
            yield _text_of(row, spec)


def _text_of(row: dict[str, Any], place: str) -> str:
    if not isinstance(row.get("text"), str):
        raise UserError(f'--data {place}: a row has no "text" that is a string, its columns: {", ".join(row)}')
    return row["text"]


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # as above: any of them may come while a stream is read
        raise UserError(f"--data {place}: the data set cannot be read: {one_line(error)}") from error
