"""The HTML page of every report: sections of tables, pictures and the command that made them, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fsam_core import backends


@dataclass(frozen=True)
class Section:
    """One part of a page: what was measured, by which command, and the table and pictures of it.

    Attributes:
        headings, cells: the table, as text.
        command: the command line that made it.
        facts: name -> value: settings, data, machine.
        pictures: (caption, HTML of the picture); the caller answers for its being safe.
        notes: sentences under the table.
        best: indices of the rows that stand out.
        texts: (caption, text) of samples, shown as they are.
        commands: (what it would show, command) of what to try next.
        words: headings of columns of words; a column is one too where a cell begins with a letter.
    """

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    command: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    best: Sequence[int] = ()
    words: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()

    @cached_property
    def alignment(self) -> list[str]:
        """The CSS class of each column."""
        is_text = lambda i: self.headings[i] in self.words or any(line[i][:1].isalpha() for line in self.cells)
        return ["text" if is_text(i) else "number" for i in range(len(self.headings))]


def render(title: str, sections: Sequence[Section]) -> str:
    """The page's HTML, which needs no other file.

    Raises:
        UserError: where jinja2 is not installed.
    """
    backends.require("jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fsam_trainers", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(title=title, sections=sections)
