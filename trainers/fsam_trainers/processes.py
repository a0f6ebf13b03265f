"""The processes of one run: which of them this is, and their communication outside the training step.

`registry.joined` makes the framework's own: `jax/processes.py`, `torch/processes.py`.

A launcher (`torchrun`, or another that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts the same
command in each of them. Only the main rank writes metrics, the console, and the list that makes a checkpoint valid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from fsam_core import UserError
from fsam_trainers import placement
from fsam_trainers.config import Settings

if TYPE_CHECKING:
    from fsam_trainers.data import AnyBatches, AnyCorpus

T = TypeVar("T")
# Seconds that a process waits for the others in a step before it ends with an error.
STEP_TIMEOUT = 50.0
# Seconds that it waits while another tokenises. The death of a process is noticed anyway: its connections close.
HOST_TIMEOUT = 24 * 3600.0


class AlreadyReported(UserError):
    """An error that another process has reported to the user."""


class Stopped(Exception):
    """A signal has stopped a run; the same command resumes it.

    Attributes:
        signal: its number; 0 where it was the time, and no signal.
    """

    def __init__(self, signal: int = 0) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class Processes:
    """The processes of a run as one of them sees them; here the only one.

    Attributes:
        timeout: see `STEP_TIMEOUT`; FSAM_RANK_TIMEOUT sets it.
        hangs_after_failure: whether one that failed would wait for the others at its end, see `leave`.
    """

    rank, count, local_rank, timeout = 0, 1, 0, STEP_TIMEOUT
    hangs_after_failure = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """The function's picklable result on the main rank, which alone calls it; its UserError is raised on all."""
        return self.from_all(lambda: function() if self.is_main else None)[0]  # type: ignore[return-value]

    def from_all(self, function: Callable[[], T]) -> list[T]:
        """The function's picklable result on each rank, in order; the first rank's UserError is raised on all."""
        result, own = _tried(function)
        results, said = zip(*self.gathered((result, str(own) if own else None)), strict=True)
        failed = next((rank for rank, text in enumerate(said) if text is not None), self.rank)
        _raise(own if failed == self.rank else None, said[failed])
        return list(results)

    def first_on_host(self, function: Callable[[], T]) -> T:
        """The function's result; one rank of each host calls it before the others, which then find its cache."""
        first = self.local_rank == 0
        result, own = _tried(function) if first else (None, None)
        _raise(own, next(filter(None, self.gathered(str(own) if own else None)), None))
        return result if first else function()  # type: ignore[return-value]

    def all_reduce_max(self, *values: int) -> list[int]:
        """The maximum of each value over the ranks."""
        return list(values)

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks in order; picklable."""
        return [value]

    def close(self) -> None:
        """Leave the others, at the end of a run that did not fail."""


def _tried(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def _raise(own: UserError | None, said: str | None) -> None:
    if own is not None:
        raise own
    if said is not None:
        raise AlreadyReported(said)


_current = Processes()
_at_once = False


def current() -> Processes:
    """The processes of the current run."""
    return _current


def batches(settings: Settings, corpus: AnyCorpus) -> AnyBatches:
    """This rank's training batches, to be closed."""
    from fsam_trainers.data import training_batches  # every command imports this module, and few read data

    replicas = 1  # ranks with the same sequences; in JAX such devices belong to one process
    if settings.framework == "torch":
        placement.check_ranks(settings, _current.count)
        replicas = settings.tensor_parallel
    share = {
        "rank": _current.rank // replicas,
        "ranks": _current.count // replicas,
        "micro_batches": settings.micro_batches,
    }
    return training_batches(corpus, settings.model.seq_len, settings.batch, settings.seed, **share)


def enter(joined: Processes) -> None:
    """Make these the processes of the current run."""
    global _current
    _current = joined


def raise_if_lost(error: BaseException) -> None:
    """
    Raises:
        UserError: if the error says that another process is lost, or that the port for the others is in use.
    """
    # JAX raises gloo's errors as ValueError when a program is started and as RuntimeError when it is waited for.
    if not isinstance(error, (RuntimeError, ValueError)) or isinstance(error, UserError):
        return
    if any(phrase in str(error).lower() for phrase in ("address already in use", "failed to start rpc server")):
        raise UserError(
            f"MASTER_PORT: got {os.environ.get('MASTER_PORT')}, this port or, of JAX, the next one is in use on this "
            "machine: give another one, as torchrun --master-port does"
        ) from error
    if is_lost(error):
        here = _current
        raise UserError(
            f"rank {here.rank} of {here.count}: another rank is gone, or did not answer in {here.timeout:g} s "
            f"({_first_line(error)}); the same command resumes from the last checkpoint"
        ) from error


def leave_at_once() -> None:
    """Make `leave` end the process without waiting for threads or other processes."""
    global _at_once
    _at_once = True


def is_leaving() -> bool:
    """Whether this is one of several JAX processes that has failed."""
    return _at_once


def leave(code: int) -> NoReturn:
    """End this process; at once if it is one of several JAX processes and has failed.

    It would otherwise wait twenty minutes for orbax's threads, which wait for the part of a lost process, or five
    minutes for the shutdown barrier of `jax.distributed`.
    """
    if _at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether the error says that a rank is lost: a PyTorch DistError, or a message of gloo or JAX's coordinator."""
    text = str(error).lower()
    own = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    phrases = ("gloo", "coordination service", "connection closed by peer", "connection reset by peer")
    return own or any(x in text for x in phrases)


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0]
    return line.rpartition("] ")[2].partition(". This ")[0] or type(error).__name__


def number(name: str, default: int | None = None) -> int:
    """
    Raises:
        UserError: for an environment that only looks like a launcher's.
    """
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{name}: the environment must hold a number, as torchrun sets it; got {text!r}") from None
