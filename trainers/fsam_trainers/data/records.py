"""Data sets in rows with a `text` column: JSON lines (C4's format), plain, gzipped or zstd-compressed, and Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fsam_core.errors import UserError
from fsam_trainers.data.documents import (
    Row,
    Source,
    Stream,
    content_digest,
    extra,
    file_digest,
    one_line,
    reading,
    row_pieces,
    row_split,
)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")


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
            yield from (row.text for row in record_rows(path))

    own, others = own_validation(paths)

    def streams() -> list[Stream]:
        if not own or not others:
            return [Stream(("train", "validation"), row_pieces(rows(paths), row_split))]
        return [
            Stream(("train",), row_pieces(rows(others), lambda index: "train")),
            Stream(("validation",), row_pieces(rows(own), lambda index: "validation")),
        ]

    return Source(title, "rows", digest, streams)


def own_validation(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files whose names say that they are held out, as C4's do, and the others."""
    own = [path for path in paths if "validation" in path.name.lower()]
    return own, [path for path in paths if path not in own]


def record_rows(path: Path, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[Row]:
    """The rows of a file from number `start` on whose number is `part` modulo `parts`; the others are not decoded.

    Rows are numbered from 0. Raises UserError, naming the file, if it is damaged or a row has no text.
    """
    read = parquet_rows if path.name.lower().endswith(".parquet") else jsonl_rows
    return read(path, start, part, parts)


def jsonl_rows(path: Path, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[Row]:
    """`record_rows` of a JSON-lines file; blank lines are no rows."""
    line_number, row = 0, -1
    with reading(path), _open(path) as file:
        try:
            for line_number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                row += 1
                if row >= start and row % parts == part:
                    yield Row(row, _text_of(line, f"{path}, line {line_number}"))
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's word, not the decompressor's
                raise
            raise UserError(
                f"--data: {path} is a damaged {_compression(path)} file (after line {line_number}): {one_line(error)}"
            ) from error


def _compression(path: Path) -> str:
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower(), "")


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if _compression(path) == "gzip":
        return gzip.open(path, "rb")
    if _compression(path) == "zstd":
        return io.BufferedReader(extra("pyarrow").input_stream(str(path), compression="zstd"), 1 << 16)
    return path.open("rb")


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


def parquet_rows(path: Path, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[Row]:
    """`record_rows` of a Parquet file's `text` column; whole row groups before `start` are not read."""
    arrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'--data: {path}: no "text" column, only: {", ".join(file.schema_arrow.names[:10])}')
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            skipped = 0
            while skipped < len(sizes) and number + sizes[skipped] <= start:
                number += sizes[skipped]
                skipped += 1
            groups = list(range(skipped, len(sizes)))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=["text"]):
                first = max(number, start)
                first += (part - first) % parts
                for row, text in enumerate(batch.column(0)[first - number :: parts].to_pylist()):
                    if not isinstance(text, str):
                        place = f"{path}, row {first + row * parts + 1}"
                        raise UserError(f'--data: {place}: "text" must be a string, got {type(text).__name__}')
                    yield Row(first + row * parts, text)
                number += batch.num_rows
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {path} is a damaged Parquet file (after row {number}): {one_line(error)}") from error
