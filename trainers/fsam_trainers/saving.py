"""Checkpoints written in the background: a step waits for the copy of the state, not for the disk.

One checkpoint is written at a time, in three phases. All ranks copy their part of the state. Each rank writes its part
in its own thread. Then the main rank, in a thread as well, adds the checksums, makes the checkpoint valid and deletes
old ones. The threads run no collective: the ranks agree between two steps to enter the next phase.
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
IDLE, BUSY, FAILED = range(3)  # the state of a rank's thread; the largest of all ranks decides
POLL_SECONDS = 1.0  # a rank waits so long for its own thread before it asks about the others'
GRACE_SECONDS = 5.0  # a thread has so long to end after the run has failed


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

    As a context it ends when the last checkpoint is valid. After an exception other ranks may be anywhere: a single
    process still finishes its checkpoint, several leave it to be removed by the next run.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._pending: _Pending | None = None

    def save(self, step: int, run: dict[str, Any], model: Engine) -> None:
        """Begin a checkpoint of the present state of `model`; the one before is finished first.

        Args:
            run: what to write with the state; copied.

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
        """Agree with the other ranks, between two steps, and enter the next phase if all are ready.

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
        """Wait until the begun checkpoint is valid. Raises as `poll`."""
        while self._pending:
            self._rest(POLL_SECONDS)
            self.poll()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif processes.current().count == 1 and issubclass(kind, Exception):
            with contextlib.suppress(UserError):  # the first error is the one to report
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
        """Enter the next phase: all ranks have finished one, or a rank has failed."""

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
    """What the function will return or raise, run in a thread; a UserError where `target` cannot be written.

    The thread is a daemon. An executor's thread would be waited for even when the run ends because a rank is lost.
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
