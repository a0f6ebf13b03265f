"""Checkpoints written while training goes on: a step waits for the copy of the state, not for the disk.

One at a time, in three phases. All ranks copy their part of the state; each writes it in a thread of its own; when all
have, the main rank adds the checksums, makes the checkpoint valid and drops old ones, in a thread again. These threads
run no collective: all ranks go from one phase to the next together, where they agree between two steps.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

from fsam_core import UserError
from fsam_trainers import checkpoints, processes
from fsam_trainers.engine import Engine, Writing

T = TypeVar("T")
IDLE, BUSY, FAILED = range(3)  # the thread of a rank; the largest of all ranks decides
POLL_SECONDS = 1.0  # for which a rank waits for its own thread before it asks how the others are
GRACE_SECONDS = 5.0  # for a thread to end where the run ends without it


@dataclass
class _Pending:
    target: Path
    folder: Path
    run: dict[str, Any]
    writing: Writing
    task: Future[Any] | None
    sealing: bool = False


class Saver:
    """The checkpoints of a run, in the folder `root`, the newest `keep` of them.

    As a context it ends with the last checkpoint valid. After an exception other ranks may be anywhere: then the run
    of one process alone still ends its checkpoint, and those of several leave it to be swept.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._pending: _Pending | None = None

    def save(self, step: int, run: dict[str, Any], model: Engine) -> None:
        """Begin the checkpoint of the state that `model` is in; the one before is ended first.

        Args:
            run: what to write beside the state, as it is now.

        Raises:
            UserError: when the disk refuses this checkpoint or the one before; older ones stay.
        """
        self.wait()
        here = processes.current()
        folder, target = here.from_main(lambda: checkpoints.begin(self.root, step, model.state_bytes()))
        try:
            with checkpoints.as_user_error(target):
                writing = model.save(folder / "state")
        except UserError:
            self._discard(folder)
            raise
        task = _in_background(writing.write, target)
        self._pending = _Pending(target, folder, copy.deepcopy(run), writing, task)

    def poll(self, value: int = 0) -> int:
        """Agree with the other ranks, between two steps: take the checkpoint a phase further where all are ready.

        Returns:
            The largest `value` of any rank.

        Raises:
            UserError: when the disk has refused the checkpoint.
        """
        largest, state = processes.current().all_reduce_max(value, self._state())
        if self._pending and state != BUSY:
            self._advance(self._pending)
        return largest

    def wait(self) -> None:
        """Until the checkpoint that was begun is valid. Raises as `poll`."""
        while self._pending:
            self._rest(POLL_SECONDS)
            self.poll()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif processes.current().count == 1 and issubclass(kind, Exception):
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self.wait()
        else:
            self._rest(GRACE_SECONDS)

    def _state(self) -> int:
        task = self._pending.task if self._pending else None
        if task is None:
            return IDLE
        return BUSY if not task.done() else FAILED if task.exception() else IDLE

    def _rest(self, seconds: float) -> None:
        if self._pending and self._pending.task:
            wait([self._pending.task], timeout=seconds)

    def _advance(self, pending: _Pending) -> None:
        """All ranks are done with a phase, or one has failed."""

        def outcome() -> Any:
            self._rest(GRACE_SECONDS)
            return pending.task.result() if pending.task and pending.task.done() else None

        try:
            results = processes.current().from_all(outcome)
        except UserError:
            self._pending = None
            self._discard(pending.folder)
            raise
        pending.task = None
        if pending.sealing:
            self._pending = None
            return
        pending.sealing = True
        if processes.current().is_main:
            pending.task = _in_background(lambda: self._seal(pending, results), pending.target)

    def _seal(self, pending: _Pending, results: list[Any]) -> None:
        pending.writing.finish(results)
        checkpoints.seal(pending.folder, pending.target, pending.run, self.keep)

    def _discard(self, folder: Path) -> None:
        if processes.current().is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _in_background(function: Callable[[], T], target: Path) -> Future[T]:
    """What the function will return or raise; as one sentence where `target` cannot be written.

    The thread ends with the process: an executor's would be waited for, also where a run ends because a rank is lost.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            with checkpoints.as_user_error(target):
                future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=f"checkpoint {target.name}", daemon=True).start()
    return future
