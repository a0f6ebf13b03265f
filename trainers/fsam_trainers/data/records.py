"""Data sets in rows, of a text or of a prompt and its answer: JSON lines, plain, gzipped or by zstd, and Parquet."""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError, one_line
from fsam_trainers.data.documents import Columns, Row, encodable, extra, reading
from fsam_trainers.data.kinds import PARQUET

COLUMNS: Columns = (("text",), ("content",), ("prompt", "answer"))  # unless --text-column says it
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

    def usable(self, rows: Iterable[Row | Bad], *, whole: bool) -> Iterator[Row]:
        """The rows that hold a text. `whole`: these are all rows of a file, of which one at least must be usable."""
        good, bad, first = 0, 0, ""
        for row in rows:
            self.rows += 1
            if isinstance(row, Row):
                good += 1
                yield row
                continue
            bad += 1
            self.count += 1
            first, self.first = first or str(row), self.first or str(row)
            if self.count > SKIPPED + self.rows // 100:
                raise UserError(f"--data: {first}; {self.count} of the first {self.rows} rows hold no text")
        if bad and not good and whole:
            raise UserError(f"--data: {first}")
        if bad and first not in self._said:  # a file is read more than once
            self._said.add(first)
            _log.warning("--data: %s of %s rows skipped, the first: %s", bad, good + bad, first)


def columns_of(column: str | None) -> Columns:
    """Where a row's document may be: what --text-column names, NAME or PROMPT,ANSWER, or, if it is None, COLUMNS.

    Raises UserError for more than two names, or an empty one.
    """
    if column is None:
        return COLUMNS
    names = tuple(column.split(","))
    if len(names) > 2 or not all(names):
        raise UserError(f"--text-column: got {column!r}, give a name, or those of prompts and answers as prompt,answer")
    return (names,)


def document_of(row: Any, columns: Columns, number: int, place: str) -> Row | Bad:
    """The document in a decoded row."""
    if not isinstance(row, dict):
        return Bad(place, f'must be an object with a "{columns[0][0]}", got {type(row).__name__}')
    names, reason = _chosen(columns, row)
    for name in names:
        if not isinstance(row[name], str):
            reason = f'"{name}" must be a string, got {type(row[name]).__name__}'
    if reason:
        return Bad(place, reason)
    *prompt, text = (encodable(row[name]) for name in names)
    return Row(number, text, prompt=prompt[0] if prompt else None)


def _chosen(columns: Columns, has: Collection[str]) -> tuple[tuple[str, ...], str]:
    """Which of the columns that there are hold the document; () and the reason if it is not known."""
    found = [names for names in columns if all(name in has for name in names)]
    if not found:
        *others, last = map(_quoted, columns)
        wanted = f"{', '.join(others)} or {last}" if others else last
        return (), f"no {wanted} column, only: {', '.join(list(has)[:10])}: name what to use by --text-column"
    if len({len(names) for names in found}) > 1:
        options = " or ".join(",".join(names) for names in (found[0], found[-1]))
        return (), f"{_quoted(found[0])} beside {_quoted(found[-1])}: name what to use by --text-column {options}"
    return found[0], ""


def _quoted(names: tuple[str, ...]) -> str:
    return " with ".join(f'"{name}"' for name in names)


def record_rows(
    path: Path,
    start: int = 0,
    part: int = 0,
    parts: int = 1,
    *,
    columns: Columns = COLUMNS,
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


def _jsonl_rows(path: Path, start: int, part: int, parts: int, columns: Columns) -> Iterator[Row | Bad]:
    """Blank lines are no rows."""
    line_number, row = 0, -1
    with reading(path), _open(path) as file:
        try:
            for line_number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                row += 1
                if row >= start and row % parts == part:
                    yield _decoded(line, columns, row, f"{path}, line {line_number}")
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


def _decoded(line: bytes, columns: Columns, number: int, place: str) -> Row | Bad:
    try:
        return document_of(json.loads(line), columns, number, place)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
        return Bad(place, f"not a JSON object: {one_line(error)}")


def _parquet_rows(path: Path, start: int, part: int, parts: int, columns: Columns) -> Iterator[Row | Bad]:
    """Whole row groups before `start` are not read."""
    arrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names, reason = _chosen(columns, file.schema_arrow.names)
            if reason:
                raise UserError(f"--data: {path}: {reason}")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            skipped = 0
            while skipped < len(sizes) and number + sizes[skipped] <= start:
                number += sizes[skipped]
                skipped += 1
            groups = list(range(skipped, len(sizes)))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=list(names)):
                first = max(number, start)
                first += (part - first) % parts
                values = (batch.column(name)[first - number :: parts].to_pylist() for name in names)
                for row, value in enumerate(zip(*values, strict=True)):
                    at = first + row * parts
                    found = dict(zip(names, value, strict=True))
                    yield document_of(found, (names,), at, f"{path}, row {at + 1}")
                number += batch.num_rows
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {path} is a damaged Parquet file (after row {number}): {one_line(error)}") from error
