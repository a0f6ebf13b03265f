"""What is chosen by framework: the engine and the processes of a run. Only what is chosen is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fsam_trainers import processes
from fsam_trainers.config import Settings
from fsam_trainers.engine import Engine
from fsam_trainers.processes import Processes


def make(settings: Settings) -> Engine:
    """The engine of `settings.framework`, with freshly initialised weights.

    Raises:
        UserError: when the framework is not installed or the backend does not fit.
    """
    if settings.framework == "jax":
        from fsam_trainers.jax.engine import JaxEngine

        return JaxEngine(settings)
    from fsam_trainers.torch.engine import TorchEngine

    return TorchEngine(settings)


@contextlib.contextmanager
def joined(framework: str) -> Iterator[Processes]:
    """Join the other processes of this launch, if there are any; within the block they are `processes.current()`.

    Raises:
        UserError: when the processes cannot meet, or another one is lost while the block runs.
    """
    if processes.number("WORLD_SIZE", 1) == 1 or processes.current().count > 1:
        yield processes.current()
        return
    try:
        found = _join(framework)
    except Exception as error:
        processes.raise_if_lost(error)
        raise
    processes.enter(found)
    try:
        yield found
        found.close()
    except BaseException as error:
        if found.hangs_after_failure:
            processes.leave_at_once()
        processes.raise_if_lost(error)
        raise
    finally:
        processes.enter(Processes())


def _join(framework: str) -> Processes:
    if framework == "jax":
        from fsam_trainers.jax.processes import JaxProcesses

        return JaxProcesses()
    from fsam_trainers.torch.processes import TorchProcesses

    return TorchProcesses()
