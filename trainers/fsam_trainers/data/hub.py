"""Data sets of the Hugging Face hub, or local folders that `datasets` can load, streamed: hf:NAME or hf:NAME:CONFIG."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError, one_line
from fsam_trainers.data.documents import Columns, Row, extra
from fsam_trainers.data.records import Bad, Skipped, document_of

_DEFAULT_CONFIG = {"allenai/c4": "en"}


class Opened(NamedTuple):
    """A data set that `datasets` streams: its splits by name, "train" among them."""

    title: str
    splits: dict[str, Any]


def load(spec: str) -> Opened:
    """The data set of a SPEC, opened for streaming. Raises UserError if it cannot be, or has no train split."""
    name, config = parse(spec)
    splits = opened(spec, lambda load: load(name, config, streaming=True))
    return Opened(f"{name} ({config})" if config else name, splits)


def opened(title: str, loaded: Callable[[Any], Any]) -> dict[str, Any]:
    """The splits that `loaded(datasets.load_dataset)` gives.

    Raises:
        UserError: naming the title, where they cannot be opened or "train" is not among them.
    """
    datasets = extra("datasets")
    try:
        splits = loaded(datasets.load_dataset)
    except Exception as error:  # the hub client lets the errors of half a dozen libraries through
        raise UserError(f"--data {title}: the data set cannot be opened: {one_line(error)}") from error
    if "train" not in splits:
        raise UserError(f'--data {title}: the data set has no "train" split, only: {", ".join(splits)}')
    return dict(splits)


def identity(spec: str, look: Callable[[Path], bytes]) -> list[tuple[str, bytes]]:
    """What identifies a data set in a digest.

    One of the hub by its name: asking for its revision would need the network even when all is in the cache. The files
    of a local folder are looked at.
    """
    name, config = parse(spec)
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [(name, b""), (config or "", b""), *((path.relative_to(folder).as_posix(), look(path)) for path in files)]


def shard_rows(
    spec: str, split: Any, shard: int, columns: Columns, skipped: Skipped, start: int, part: int, parts: int
) -> Iterator[Row]:
    """Rows of one shard of a split, from number `start` on, with number ≡ part (mod parts).

    Raises UserError if the shard cannot be read, or too many rows hold no text.
    """
    place = f"{spec}, shard {shard}"

    def decoded() -> Iterator[Row | Bad]:
        with _reading(place):
            rows = split.shard(num_shards=split.num_shards, index=shard)
            for number, row in enumerate(rows.skip(start) if start else rows, start):
                if number % parts == part:
                    yield document_of(row, columns, number, f"{place}, row {number + 1}")

    yield from skipped.usable(decoded(), whole=start == 0 and parts == 1)


def parse(spec: str) -> tuple[str, str | None]:
    """(NAME or a folder, CONFIG or None) of hf:NAME[:CONFIG]."""
    rest = spec.removeprefix("hf:")
    name, _, config = (rest, "", "") if Path(rest).is_dir() else rest.partition(":")
    if not name:
        raise UserError(f"--data {spec}: no data set named: write hf:NAME or hf:NAME:CONFIG, such as hf:allenai/c4")
    return name, config or _DEFAULT_CONFIG.get(name)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # as above: any of them may come while a stream is read
        raise UserError(f"--data {place}: the data set cannot be read: {one_line(error)}") from error
