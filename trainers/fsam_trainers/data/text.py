"""UTF-8 text files in pieces that are cut at line ends, and can be read from any piece on."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fsam_core.errors import UserError
from fsam_trainers.data.documents import HELD_OUT, Row, reading
from fsam_trainers.data.kinds import not_text

PIECE = 1 << 14  # bytes of a piece
REACH = 1 << 12  # bytes it may grow by to end with a line

_LINE_END = re.compile(rb"\S\n(?=\S)")


def text_rows(
    path: Path, start: int, part: int, parts: int, *, begin: int = 0, end: int | None = None
) -> Iterator[Row]:
    """Pieces of the bytes begin … end of a file, from number `start` on, with number ≡ part (mod parts).

    Together the pieces are one document, without a byte order mark. If they are distributed over several parts, each is
    a document of its own, because the text that follows it is then another one. Raises UserError, naming the byte, if
    they are not UTF-8 text.
    """
    with reading(path), path.open("rb") as file:
        end = path.stat().st_size if end is None else end
        count = -(-(end - begin) // PIECE)
        for number in range(start + (part - start) % parts, count, parts):
            cuts = (0 if n == 0 else _boundary(file, begin + n * PIECE) for n in (number, number + 1))
            first, last = (min(max(cut, begin), end) for cut in cuts)
            file.seek(first)
            content = file.read(last - first)
            if reason := not_text(path, content, first):
                raise UserError(f"--data: {path} {reason}")
            text = content.removeprefix(b"" if first else codecs.BOM_UTF8).decode()
            apart = parts > 1
            yield Row(number, text, ends=apart or number == count - 1, starts=apart or number == 0)


def held_out_from(path: Path) -> int:
    """The byte at which the last twentieth of a file begins: after a line end if one is near, else at a character."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        mark, reach = size - size // HELD_OUT, min(size // 10, 1 << 16)
        file.seek(mark - reach)
        window = file.read(2 * reach)[: size - 1 - (mark - reach)]  # a line end that ends the text is no place to cut
        ends = [mark - reach + place + 1 for place, byte in enumerate(window) if byte == 0x0A]
        return min(ends, key=lambda end: abs(end - mark)) if ends else _character(file, mark)


def _boundary(file: BinaryIO, mark: int) -> int:
    """The start of the piece near byte `mark`: after a line end in reach, one between two lines of text if there is."""
    file.seek(mark - 1)
    window = file.read(REACH)
    # Tokenizers encode white space on both sides of a line end together.
    best = _LINE_END.search(window)
    line = best.end() if best else window.find(b"\n") + 1
    return mark - 1 + line if line else _character(file, mark)


def _character(file: BinaryIO, mark: int) -> int:
    """The start of the first character at byte `mark` or after it."""
    file.seek(mark)
    window = file.read(3)
    inside = 0
    while inside < len(window) and window[inside] & 0xC0 == 0x80:  # a character's second, third or fourth byte
        inside += 1
    return mark + inside
