"""Rows of a text file that can be read from any of them on: pieces cut at line ends near multiples of PIECE bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fsam_core.errors import UserError
from fsam_trainers.data.documents import Row, reading

PIECE = 1 << 14  # bytes
REACH = 1 << 12  # bytes a piece may grow by to end with a line


def piece_count(path: Path) -> int:
    """How many pieces a file has: from its size alone."""
    with reading(path):
        return -(-path.stat().st_size // PIECE)


def text_rows(
    path: Path, start: int, part: int, parts: int, *, first: int = 0, last: int | None = None, skip_binary: bool = False
) -> Iterator[Row]:
    """Pieces first … last of a file, from number `start` on (counted from `first`) with number ≡ part (mod parts).

    Together the pieces are the file. The last one ends a document; so does each where they are dealt out to several
    parts, since what follows it then is another text. Raises UserError where the file is not UTF-8; with skip_binary
    one that does not start like text gives no rows instead.
    """
    count = (piece_count(path) if last is None else last) - first
    with reading(path), path.open("rb") as file:
        if count <= 0 or (skip_binary and not _looks_like_text(file)):
            return
        for number in range(start + (part - start) % parts, count, parts):
            begin, end = (_boundary(file, (first + piece) * PIECE) for piece in (number, number + 1))
            file.seek(begin)
            content = file.read(end - begin)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"--data: {path} is not UTF-8 text: byte {begin + error.start} is {content[error.start]:#04x}"
                ) from error
            yield Row(number, text, ends=parts > 1 or number == count - 1)


def _boundary(file: BinaryIO, mark: int) -> int:
    """Where the piece starts that byte `mark` is near to: after the next line end in reach, else at a character."""
    if mark == 0:
        return 0
    file.seek(mark - 1)
    window = file.read(REACH)
    line = window.find(b"\n")
    if line >= 0:
        return mark + line
    inside = 1
    while inside < len(window) and window[inside] & 0xC0 == 0x80:  # a character's second, third or fourth byte
        inside += 1
    return mark - 1 + min(inside, len(window))


def _looks_like_text(file: BinaryIO) -> bool:
    content = file.read(1 << 13)
    if b"\0" in content:
        return False
    for cut in range(min(4, len(content) + 1)):  # the last character may be incomplete
        try:
            content[: len(content) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return True
    return False
