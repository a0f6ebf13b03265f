"""What a file holds, by its name and its first bytes: one rule for a single file, a folder and a glob."""

import codecs
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsam_trainers.data.documents import Columns, reading

Kind = Literal["tokens", "rows", "text", "other"]

ROWS = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
PARQUET = b"PAR1"
_HEAD = 1 << 13  # bytes that are looked at
_LINE = 1 << 24  # bytes of a first line that may be a JSON object
_PACKED = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2"}
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Found(NamedTuple):
    """What a file holds; of an "other" one, `reason` says what it is and what to do."""

    kind: Kind
    reason: str = ""


def kind_of(path: Path, columns: Columns) -> Found:
    """Token ids, rows with one of these columns, text, or something else. Reads 8 kB, or one line of JSON."""
    name = path.name.lower()
    if name.endswith(".bin"):
        return Found("tokens")
    if name.endswith(ROWS):
        return Found("rows")
    if name.endswith((".csv", ".tsv")):
        return Found("other", "is a table: write its text as .jsonl or .parquet; to train on it as it is, call it .txt")
    with reading(path), path.open("rb") as file:
        head = file.read(_HEAD)
        if head.startswith(PARQUET):
            return Found("rows")
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"{"):
            file.seek(head.index(b"{"))
            row = _object(file.readline(_LINE))
            if any(row.keys() >= set(names) for names in columns):
                return Found("rows")
            # Two complete objects in two lines: rows whose text has another name. A document of JSON is text.
            if row and name.endswith(".json") and _object(file.readline(_LINE)):
                return Found("rows")
    has_column = any(all(re.search(rb'"%s"\s*:' % re.escape(x.encode()), head) for x in names) for names in columns)
    if name.endswith(".json") and re.match(rb"\[\s*\{", start) and has_column:
        return Found("other", f"is one JSON array: write an object a line, as jq -c '.[]' {path} does")
    whole = len(head) < _HEAD
    return Found("other", reason) if (reason := not_text(path, head, whole=whole)) else Found("text")


def not_text(path: Path, content: bytes, begin: int = 0, *, whole: bool = True) -> str:
    """Why the bytes from number `begin` on are not UTF-8 text, and what to do; "" if they are.

    whole: the content ends with a character; otherwise the last one may be incomplete.
    """
    if not begin:
        if content.startswith(_WIDE):
            wide = "UTF-32" if content.startswith(_WIDE[:2]) else "UTF-16"
            return f"is {wide} and not UTF-8 text: convert it: iconv -f {wide} -t UTF-8 {path}"
        for magic, name in _PACKED.items():
            if content.startswith(magic):
                return f"is compressed ({name}) and not UTF-8 text: unpack it, or call files of rows .jsonl.gz or .zst"
    place = content.find(b"\0")
    if place >= 0:
        return f"is not text: byte {begin + place} is NUL: it is a binary file, or UTF-16 for iconv to convert"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final=whole)
    except UnicodeDecodeError as error:
        return (
            f"is not UTF-8 text: byte {begin + error.start} is {content[error.start]:#04x}: convert it: "
            f"if it is Latin-1, iconv -f ISO-8859-1 -t UTF-8 {path}"
        )
    return ""


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds, {} if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
