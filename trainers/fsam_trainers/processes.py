"""The processes of one run: which of them this is, and what they agree upon beside the training step.

A launcher, `torchrun` or another that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, starts the same
command for each of them. The main rank alone writes metrics, the console, and the list that makes a checkpoint valid.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from fsam_core import UserError
from fsam_trainers import placement
from fsam_trainers.config import Settings
from fsam_trainers.data import Batches, Corpus, StreamedBatches, StreamedCorpus, training_batches

T = TypeVar("T")
# Seconds that a rank waits for the others in a step before it gives them up.
PATIENCE = 50.0
# For what one rank does while the others wait, tokenising. One that dies is noticed all the same, since its connections
# close.
UNHURRIED = timedelta(days=1)


class SaidByMain(UserError):
    """What another rank has told the user already."""


class Ranks:
    """The only process of a run.

    Attributes:
        patience: see `PATIENCE`; FSAM_RANK_TIMEOUT sets it.
    """

    rank, count, local_rank, patience = 0, 1, 0, PATIENCE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """What the main rank gets from the function, which it alone calls; picklable. A UserError goes to all ranks."""
        return self.from_all(lambda: function() if self.is_main else None)[0]  # type: ignore[return-value]

    def from_all(self, function: Callable[[], T]) -> list[T]:
        """What each rank gets from the function, in order; picklable. The first rank's UserError goes to all."""
        result, own = _tried(function)
        results, said = zip(*self.gathered((result, str(own) if own else None)), strict=True)
        failed = next((rank for rank, text in enumerate(said) if text is not None), self.rank)
        _raise(own if failed == self.rank else None, said[failed])
        return list(results)

    def first_on_host(self, function: Callable[[], T]) -> T:
        """What the function returns; one rank of each host calls it before the others do, and leaves a cache."""
        first = self.local_rank == 0
        result, own = _tried(function) if first else (None, None)
        _raise(own, next(filter(None, self.gathered(str(own) if own else None)), None))
        return result if first else function()  # type: ignore[return-value]

    def most(self, *values: int) -> list[int]:
        """For each value the largest that any rank has."""
        return list(values)

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks in order; picklable."""
        return [value]


class TorchRanks(Ranks):
    """Processes in PyTorch's default process group."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.count, self.local_rank = (number(x) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.patience = float(os.environ.get("FSAM_RANK_TIMEOUT", PATIENCE))
        backend = "gloo"
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(self.local_rank)
            device = torch.accelerator.current_accelerator()
            assert device is not None
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(backend, timeout=timedelta(seconds=self.patience))
        self._unhurried = dist.new_group(backend="gloo", timeout=UNHURRIED)

    def most(self, *values: int) -> list[int]:
        import torch
        import torch.distributed as dist

        largest = torch.tensor(values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gathered(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._unhurried)
        return values


def _tried(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def _raise(own: UserError | None, said: str | None) -> None:
    if own is not None:
        raise own
    if said is not None:
        raise SaidByMain(said)


_current = Ranks()
_in_a_hurry = False


def current() -> Ranks:
    """The ranks of the run that is under way."""
    return _current


def batches(settings: Settings, corpus: Corpus | StreamedCorpus) -> Batches | StreamedBatches:
    """This rank's training batches, to be closed."""
    alike = 1  # ranks that have the same sequences; in JAX such devices are of one process
    if settings.framework == "torch":
        placement.check_ranks(settings, _current.count)
        alike = settings.tensor_parallel
    share = {"rank": _current.rank // alike, "ranks": _current.count // alike, "micro_batches": settings.micro_batches}
    return training_batches(corpus, settings.model.seq_len, settings.batch, settings.seed, **share)


@contextlib.contextmanager
def together(framework: str) -> Iterator[Ranks]:
    """Join the other processes of this launch, if there are any.

    Raises:
        UserError: when another rank is lost while the block runs.
    """
    global _current, _in_a_hurry
    if number("WORLD_SIZE", 1) == 1 or _current.count > 1:
        yield _current
        return
    if framework == "jax":
        from fsam_trainers.jax import processes

        _current = processes.JaxRanks()
        try:
            yield _current
        except BaseException as error:
            _in_a_hurry = True
            _say_lost(error)
            raise
        finally:
            _current = Ranks()
        return
    import torch.distributed as dist

    _current = TorchRanks()
    try:
        yield _current
        dist.destroy_process_group()
    except Exception as error:
        _say_lost(error)
        raise
    finally:
        _current = Ranks()


def _say_lost(error: BaseException) -> None:
    """
    Raises:
        UserError: in place of an error that says that another rank is gone.
    """
    # What gloo says JAX raises as a ValueError where a program is started, as a RuntimeError where it is waited for.
    if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, UserError) and is_lost(error):
        here = _current
        raise UserError(
            f"rank {here.rank} of {here.count}: another rank is gone, or did not answer in {here.patience:g} s "
            f"({_first_line(error)}); the same command goes on from the last checkpoint"
        ) from error


def is_leaving() -> bool:
    """Whether this is one of several JAX processes that has failed."""
    return _in_a_hurry


def leave(code: int) -> NoReturn:
    """End this process: at once where it is one of several of JAX that failed.

    Such a one would wait twenty minutes for orbax's threads, which wait for a process whose part was not written, or
    five for all to come to the end that `jax.distributed` has them share.
    """
    if _in_a_hurry:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether another rank is gone: one of PyTorch's errors of its own, or what gloo or JAX's coordinator says."""
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
