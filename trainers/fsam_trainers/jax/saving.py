"""A JAX state on its way to disk: orbax copies it to the host at once and writes it in threads of its own."""

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

AFTER_A_FAILURE = 0.5  # seconds in which the writes still under way end


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
    """Orbax raises what went wrong while it wrote; its threads need not also print it, pages long, as they do.

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
        # The other writes' errors live as long as this one does, and then say that nobody asked for them.
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
