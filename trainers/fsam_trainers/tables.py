"""Tables for a terminal: numbers are never cut, words wrap, and columns that do not fit follow below."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import rich.box
from rich.table import Table
from rich.text import Text

from fsam_trainers.console import stdout

NARROW = 24  # to this width a column of words may wrap, at spaces and colons
GAP = 2


def show(*tables: Table) -> None:
    """Print tables to stdout, each in blocks of as many columns as fit; each begins with the leading columns of words.

    A column holds words, which may wrap, if it is the first, or if it is not justified to the right and a cell begins
    with a letter. Columns without content are left out. A table of one row is printed as a line for each column.
    """
    console = stdout()
    for number, table in enumerate(tables):
        if number:
            console.print()
        if table.title:
            console.print(table.title, style="bold", markup=isinstance(table.title, str))
        columns = [_column(table, i) for i in range(len(table.columns))]
        held = columns[:1] + [column for column in columns[1:] if any(column.cells)]
        if len(table.rows) == 1:
            show_values([(" ".join(column.heading.split()), column.cells[0]) for column in held])
            continue
        sections = [row.end_section for row in table.rows]
        for part, block in enumerate(_blocks(held, console.width)):
            if part:
                console.print()
            console.print(_drawn(block, sections, console.width))


def show_values(values: Sequence[tuple[str, str]]) -> None:
    """Print a line "name  value" for each."""
    width = max(len(name) for name, _ in values)
    show_lines(*(f"{name:{width}}  {value}" for name, value in values))


def show_lines(*lines: str) -> None:
    """Print lines that are cut nowhere: paths, commands, notes."""
    console = stdout()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: Sequence[str]
    is_words: bool

    @property
    def wrapped(self) -> Sequence[str]:
        """The cells on lines that are as narrow as they may be."""
        return ["\n".join(_lines(cell)) for cell in self.cells] if self.is_words else self.cells

    @property
    def least(self) -> int:
        return max(map(len, "\n".join((*self.wrapped, self.heading)).split("\n")))

    @property
    def natural(self) -> int:
        return max(map(len, (*self.cells, *self.heading.split("\n"))))


def _lines(cell: str) -> list[str]:
    """The cell broken after spaces and colons, else anywhere."""
    lines = [""]
    for piece in re.findall(r"[^ :]*[ :]?", cell):
        if len(lines[-1] + piece.rstrip()) > NARROW:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > NARROW:
            lines[-1:] = [lines[-1][:NARROW], lines[-1][NARROW:]]
    return [line.rstrip() for line in lines if line]


def _column(table: Table, i: int) -> _Column:
    column = table.columns[i]
    heading, *cells = (
        x.plain if isinstance(x, Text) else Text.from_markup(str(x)).plain for x in (column.header, *column.cells)
    )
    if i == 0 or (column.justify != "right" and any(cell[:1].isalpha() for cell in cells)):
        return _Column(heading, cells, True)
    # The heading on as many lines as keep it no wider than the numbers.
    width = max(map(len, (*cells, *heading.split())), default=1)
    return _Column("\n".join(textwrap.wrap(heading, width, break_on_hyphens=False)), cells, False)


def _blocks(columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    names = list(itertools.takewhile(lambda column: column.is_words, columns))
    block, used = list(names), sum(column.least + GAP for column in names) - GAP
    taken = used
    for column in columns[len(names) :]:
        if taken + GAP + column.least > width and len(block) > len(names):
            yield block
            block, taken = list(names), used
        block, taken = [*block, column], taken + GAP + column.least
    yield block


def _drawn(columns: Sequence[_Column], sections: Sequence[bool], width: int) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    fits = sum(column.natural + GAP for column in columns) - GAP <= width
    for column in columns:
        table.add_column(Text(column.heading), justify="left" if column.is_words else "right", no_wrap=True)
    cells = [column.cells if fits else column.wrapped for column in columns]
    for number, ends in enumerate(sections):
        table.add_row(*(Text(of_column[number]) for of_column in cells), end_section=ends)
    return table
