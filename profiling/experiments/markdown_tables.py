"""Tables of the pages that experiments write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """In Markdown, without a newline at its end."""
    line = lambda row: f"| {' | '.join(row)} |"
    return "\n".join([line(headings), "|---" * len(headings) + "|", *map(line, cells)])
