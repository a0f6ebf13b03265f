"""Saving a JAX state: orbax copies it to the host at once and writes it in its own threads."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from fsam_trainers.engine import Writing

AFTER_A_FAILURE = 0.5  # seconds for the pending writes to end


def begin(state: dict[str, Any], folder: Path) -> Writing:
    """Copy this process's part of `state`; the step that follows may donate it.

    What the threads of several processes wait for is the coordinator of `jax.distributed`; they run no collective.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_echo())
        checkpointer = stack.enter_context(ocp.StandardCheckpointer())
        checkpointer.save(folder.absolute(), state)
        writing = stack.pop_all()

    def write() -> None:
        with writing:
            checkpointer.wait_until_finished()

    return Writing(write, lambda results: None)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Suppress the long error messages that orbax's threads print in addition to the exception that orbax raises.

    They print through the hooks for exceptions nobody catches, some of them after the save has already failed. What
    the main thread has to say, which trains meanwhile, is printed.
    """
    logger = logging.getLogger("absl")
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = (_of_the_main_thread(hook) for hook in hooks)
    logger.addFilter(_from_the_main_thread)
    try:
        yield
    except BaseException:
        # The errors of other writes are released with this one, and asyncio then reports them as never retrieved.
        logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        time.sleep(AFTER_A_FAILURE)
        raise
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        logger.removeFilter(_from_the_main_thread)


def _of_the_main_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: hook(*args) if threading.current_thread() is threading.main_thread() else None


def _from_the_main_thread(record: logging.LogRecord) -> bool:
    return record.thread == threading.main_thread().ident
