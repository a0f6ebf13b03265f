"""Data sets in rows with a `text` column: JSON lines (C4's format), plain or gzipped, and Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fsam_core.errors import UserError

from .documents import Source, Stream, content_digest, extra, file_digest, one_line, reading, row_pieces, row_split

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


def is_records(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return path.name.lower().endswith(SUFFIXES)


def records_source(title: str, paths: list[Path]) -> Source:
    """The rows of all `paths`, file after file, one document each.

    Files with "validation" in their names, as C4's have, are the held-out split if there are others beside them;
    without such files the rows are split by a hash of their number.

    Raises UserError, here or while reading, for a file that cannot be read, is damaged, or has a row without a text.
    """
    digest = content_digest("records", ((path.name, file_digest(path)) for path in paths))

    def rows(paths: list[Path]) -> Iterator[str]:
        for path in paths:
            yield from parquet_rows(path) if path.name.lower().endswith(".parquet") else jsonl_rows(path)

    own = [path for path in paths if "validation" in path.name.lower()]
    others = [path for path in paths if path not in own]

    def streams() -> list[Stream]:
        if not own or not others:
            return [Stream(("train", "validation"), row_pieces(rows(paths), row_split))]
        return [
            Stream(("train",), row_pieces(rows(others), lambda index: "train")),
            Stream(("validation",), row_pieces(rows(own), lambda index: "validation")),
        ]

    return Source(title, "rows", digest, streams)


def jsonl_rows(path: Path) -> Iterator[str]:
    """The `text` of every line of a JSON-lines file; blank lines are no rows."""
    number = 0
    with reading(path), _open(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield _text_of(line, f"{path}, line {number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"--data: {path} is a damaged gzip file (after line {number}): {one_line(error)}"
            ) from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _text_of(line: bytes, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
        raise UserError(f"--data: {place}: not a JSON object: {one_line(error)}") from error
    if not isinstance(row, dict) or "text" not in row:
        has = ", ".join(list(row)[:10]) if isinstance(row, dict) else type(row).__name__
        raise UserError(f'--data: {place}: no "text" column, only: {has}')
    if not isinstance(row["text"], str):
        raise UserError(f'--data: {place}: "text" must be a string, got {type(row["text"]).__name__}')
    return row["text"]


def parquet_rows(path: Path) -> Iterator[str]:
    """The `text` column of a Parquet file, row by row."""
    arrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'--data: {path}: no "text" column, only: {", ".join(file.schema_arrow.names[:10])}')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise UserError(
                            f'--data: {path}, row {number}: "text" must be a string, got {type(text).__name__}'
                        )
                    yield text
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {path} is a damaged Parquet file (after row {number}): {one_line(error)}") from error
