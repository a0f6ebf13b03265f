"""Progress for a person: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress

from fsam_trainers.config import Settings

SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Writes to stderr, so that stdout holds results alone."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = rich.console.Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.rich.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def evaluated(self, step: int, val_loss: float, accuracies: dict[str, float]) -> None:
        more = "".join(f", {name.removeprefix('val_')} {value:.2%}" for name, value in accuracies.items())
        self.say(f"step {step}: validation loss {val_loss:.4f}{more}")

    @contextlib.contextmanager
    def counting(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar for `total` equal pieces of work; the yielded function advances it by one."""
        with rich.progress.Progress(console=self.rich, transient=True, disable=not self.rich.is_terminal) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)

    @contextlib.contextmanager
    def progress(self, settings: Settings, now: Any) -> Iterator[Callable[[float, float], None]]:
        """The bar of a training run at `now` (a `loop.Progress`); the yielded function takes (loss, milliseconds)."""
        text = rich.progress.TextColumn("{task.fields[status]}")
        columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), text)
        name = f"{settings.framework} {settings.method}"
        last, smooth = time.monotonic(), None

        def update(loss: float, milliseconds: float) -> None:
            nonlocal last, smooth
            smooth = milliseconds if smooth is None else 0.9 * smooth + 0.1 * milliseconds
            status = line(settings, loss, smooth)
            bar.update(task, completed=now.step, status=status)
            finished = now.step == settings.steps
            if not self.rich.is_terminal and (finished or time.monotonic() - last > SECONDS_BETWEEN_LINES):
                last = time.monotonic()
                self.say(f"{name} {now.step}/{settings.steps} {status}")

        remaining = rich.progress.TimeRemainingColumn()
        with rich.progress.Progress(
            *columns, remaining, console=self.rich, disable=not self.rich.is_terminal, transient=True
        ) as bar:
            task = bar.add_task(name, total=settings.steps, completed=now.step, status="compiling")
            yield update


def line(settings: Settings, loss: float, milliseconds: float) -> str:
    """Loss and speed of a step in one line. A ratio to AdamW needs steps of both that were timed in the same minute."""
    tokens = settings.tokens_per_step / milliseconds * 1000
    return f"loss {loss:.4f} | {tokens:,.0f} tokens/s | {milliseconds:,.0f} ms/step"


class Results(rich.console.Console):
    """A console that leaves a closed pipe to the command."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def stdout() -> rich.console.Console:
    """The console for results: as wide as the terminal; without one, COLUMNS or 80."""
    return Results(highlight=False)


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["fsam", *sys.argv[1:]])


def without(words: Sequence[str], options: Container[str]) -> list[str]:
    """The words of a command line without these options ("learning-rate", …) and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if word.startswith("--"):
            option, equals, _ = word[2:].partition("=")
            skip = option.replace("_", "-") in options
            if skip and equals:
                skip = False
                continue
        if not skip:
            kept.append(word)
    return kept
