"""A process that answers messages: `python -m MODULE FD`, FD being its end of a pipe."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import check_at_least


class WorkerProcess:
    """One such process. module: its program. doing: what it does, for messages ("tokenizing"). first: sent at once."""

    def __init__(self, module: str, doing: str, first: Any) -> None:
        self._doing = doing
        self.title = ""  # what it is at, "" if nothing
        self._last = "nothing yet"
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # The processes are the parallelism. They find the same packages as this one.
                env={
                    **os.environ,
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                # A signal to the terminal's group is for the run, which then saves; the worker ends with its pipe.
                start_new_session=True,
            )
        with self._alive():
            self.pipe.send(first)

    def give(self, title: str, message: Any) -> None:
        """Send a message, to be answered. Raises UserError if the process has died."""
        self.title = self._last = title
        with self._alive():
            self.pipe.send(message)

    def answer(self) -> Any:
        """The answer to the message, waited for. Raises UserError if the process has died."""
        with self._alive():
            answer = self.pipe.recv()
        self.title = ""
        return answer

    def check(self) -> None:
        """Raise UserError if the process has died, busy or not."""
        if self.process.poll() is not None:
            raise self._death()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:  # the other end of the pipe is gone
            raise self._death() from error

    def _death(self) -> UserError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
        at = "was at" if self.title else "had last done"
        return UserError(
            f"--data: the {self._doing} process {self.process.pid} {how}; it {at} {self._last}: "
            "the same command resumes from the last checkpoint"
        )


def serve(answering: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The program of such a process: answer every message by `answering(first)(message)`, until the run has ended."""
    # A run that receives a signal finishes its step and saves; its workers end with their pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as pipe:
        try:
            answer_of = answering(pipe.recv())
            while True:
                pipe.send(answer_of(pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def count_for(asked: int | None) -> int:
    """How many such processes --data-workers asks for: by default one fewer than there are cores, 1 to 4.

    Raises:
        UserError: for a number below 0.
    """
    count = min(4, max(1, (os.cpu_count() or 1) - 1)) if asked is None else asked
    check_at_least("--data-workers", count, 0)
    return count
