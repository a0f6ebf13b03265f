"""Data sets in rows with a text column: JSON lines (C4's format), plain, gzipped or zstd-compressed, and Parquet."""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError
from fsam_trainers.data.documents import Row, extra, one_line, reading
from fsam_trainers.data.kinds import PARQUET

COLUMNS = ("text", "content")  # where a row's text is, unless --text-column says it: the first of these that it has
SKIPPED = 10  # rows without a text that may be skipped, and one in a hundred

_log = logging.getLogger(__name__)


class Bad(NamedTuple):
    """A row that cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Skipped:
    """Counts the rows that hold no text; too many of them raise a UserError. One for all files of a corpus."""

    def __init__(self) -> None:
        self.rows = self.count = 0
        self.first = ""
        self._said: set[str] = set()

    def usable(self, rows: Iterable[tuple[int, str | Bad]], *, whole: bool) -> Iterator[Row]:
        """The rows that hold a text. `whole`: these are all rows of a file, of which one at least must be usable."""
        good, bad, first = 0, 0, ""
        for number, text in rows:
            self.rows += 1
            if isinstance(text, str):
                good += 1
                yield Row(number, text)
                continue
            bad += 1
            self.count += 1
            first, self.first = first or str(text), self.first or str(text)
            if self.count > SKIPPED + self.rows // 100:
                raise UserError(f"--data: {first}; {self.count} of the first {self.rows} rows hold no text")
        if bad and not good and whole:
            raise UserError(f"--data: {first}")
        if bad and first not in self._said:  # a file is read more than once
            self._said.add(first)
            _log.warning("--data: %s of %s rows skipped, the first: %s", bad, good + bad, first)


def columns_of(column: str | None) -> tuple[str, ...]:
    """Where a row's text may be: in the column of this name, or, if there is none, in one of COLUMNS."""
    return COLUMNS if column is None else (column,)


def text_of(row: Any, columns: tuple[str, ...], place: str) -> str | Bad:
    """The text of a decoded row."""
    column = next((name for name in columns if name in row), None) if isinstance(row, dict) else None
    if not isinstance(row, dict):
        return Bad(place, f'must be an object with a "{columns[0]}", got {type(row).__name__}')
    if column is None:
        return Bad(place, _no_column(columns, list(row)))
    text = row[column]
    return text if isinstance(text, str) else Bad(place, f'"{column}" must be a string, got {type(text).__name__}')


def record_rows(
    path: Path,
    start: int = 0,
    part: int = 0,
    parts: int = 1,
    *,
    columns: tuple[str, ...] = COLUMNS,
    skipped: Skipped | None = None,
) -> Iterator[Row]:
    """The rows of a file from number `start` on whose number is `part` modulo `parts`; the others are not decoded.

    Rows are numbered from 0; one that holds no text is skipped and keeps its number. Raises UserError, naming the file,
    if it is damaged, none of its rows has a text, or more rows have none than `Skipped` allows.
    """
    read = _parquet_rows if _is_parquet(path) else _jsonl_rows
    rows = read(path, start, part, parts, columns)
    yield from (skipped or Skipped()).usable(rows, whole=start == 0 and parts == 1)


def _is_parquet(path: Path) -> bool:
    if path.name.lower().endswith(".parquet"):
        return True
    with reading(path), path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def _no_column(columns: tuple[str, ...], has: list[str]) -> str:
    wanted = " or ".join(f'"{name}"' for name in columns)
    return f"no {wanted} column, only: {', '.join(has[:10])}: name the one with the text by --text-column"


def _jsonl_rows(
    path: Path, start: int, part: int, parts: int, columns: tuple[str, ...]
) -> Iterator[tuple[int, str | Bad]]:
    """Blank lines are no rows."""
    line_number, row = 0, -1
    with reading(path), _open(path) as file:
        try:
            for line_number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                row += 1
                if row >= start and row % parts == part:
                    yield row, _decoded(line, columns, f"{path}, line {line_number}")
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


def _decoded(line: bytes, columns: tuple[str, ...], place: str) -> str | Bad:
    try:
        return text_of(json.loads(line), columns, place)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
        return Bad(place, f"not a JSON object: {one_line(error)}")


def _parquet_rows(
    path: Path, start: int, part: int, parts: int, columns: tuple[str, ...]
) -> Iterator[tuple[int, str | Bad]]:
    """Whole row groups before `start` are not read."""
    arrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in columns if name in names), None)
            if column is None:
                raise UserError(f"--data: {path}: {_no_column(columns, names)}")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            skipped = 0
            while skipped < len(sizes) and number + sizes[skipped] <= start:
                number += sizes[skipped]
                skipped += 1
            groups = list(range(skipped, len(sizes)))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
                first = max(number, start)
                first += (part - first) % parts
                for row, text in enumerate(batch.column(0)[first - number :: parts].to_pylist()):
                    place = f"{path}, row {first + row * parts + 1}"
                    yield first + row * parts, text_of({column: text}, columns, place)
                number += batch.num_rows
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {path} is a damaged Parquet file (after row {number}): {one_line(error)}") from error
