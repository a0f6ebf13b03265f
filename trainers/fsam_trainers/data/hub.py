"""Data sets of the Hugging Face hub, or local folders that `datasets` can load, streamed: hf:NAME or hf:NAME:CONFIG."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsam_core.errors import UserError

from .documents import Source, Stream, content_digest, extra, file_digest, one_line, row_pieces, row_split

_DEFAULT_CONFIG = {"allenai/c4": "en"}


def hub_source(spec: str, max_tokens: int | None) -> Source:
    """The data set of a SPEC that starts with "hf:".

    Its own validation split is used where it has one, else rows are held out by a hash of their number. Raises
    UserError without `max_tokens`, and, when opened, for a data set that cannot be reached or has no `text` column.
    """
    if max_tokens is None:
        raise UserError(f"--data {spec}: a streamed data set needs --max-tokens N")
    name, config = _parse(spec)
    # A hub data set is known by its name: asking for its revision would need the network even when all is in the cache.
    # A local folder can be looked at.
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    parts = [(name, b""), (config or "", b"")]
    parts += [(path.relative_to(folder).as_posix(), file_digest(path)) for path in files]
    title = f"{name} ({config})" if config else name
    return Source(title, "rows", content_digest("hf", parts), lambda: _open(spec, name, config))


def _parse(spec: str) -> tuple[str, str | None]:
    rest = spec.removeprefix("hf:")
    name, _, config = (rest, "", "") if Path(rest).is_dir() else rest.partition(":")
    if not name:
        raise UserError(f"--data {spec}: no data set named: write hf:NAME or hf:NAME:CONFIG, such as hf:allenai/c4")
    return name, config or _DEFAULT_CONFIG.get(name)


def _open(spec: str, name: str, config: str | None) -> list[Stream]:
    datasets = extra("datasets")
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # the hub client lets the errors of half a dozen libraries through
        raise UserError(f"--data {spec}: the data set cannot be opened: {one_line(error)}") from error
    if "train" not in splits:
        raise UserError(f'--data {spec}: the data set has no "train" split, only: {", ".join(splits)}')
    if "validation" not in splits:
        return [Stream(("train", "validation"), row_pieces(_texts(spec, splits["train"]), row_split))]
    return [
        Stream(("train",), row_pieces(_texts(spec, splits["train"]), lambda _: "train")),
        Stream(("validation",), row_pieces(_texts(spec, splits["validation"]), lambda _: "validation")),
    ]


def _texts(spec: str, rows: Any) -> Iterator[str]:
    try:
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise UserError(f'--data {spec}: a row has no "text" that is a string, its columns: {", ".join(row)}')
            yield row["text"]
    except UserError:
        raise
    except Exception as error:  # as above: any of them may come while a stream is read
        raise UserError(f"--data {spec}: the data set cannot be read: {one_line(error)}") from error
