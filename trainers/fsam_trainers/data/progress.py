"""A status line on the terminal during a long preparation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows `text` on stderr until the block is left; the value replaces it. Silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text, spinner="line") as line:
        yield lambda text: line.update(text)
