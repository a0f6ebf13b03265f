"""The `fsam` command. Results go to stdout, progress to stderr; bad input is one sentence and exit code 2."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import platform
import signal
import sys
import traceback

from fsam_core import UserError
from fsam_core.backends import installed
from fsam_trainers import host_memory, platforms, processes
from fsam_trainers.cli.parsing import no_command
from fsam_trainers.files import is_full, is_utf8

# Group -> subcommand -> (the module whose `main(arguments)` runs it and returns the exit code, what it does). The
# profiling package is imported by name, as nothing else of it is.
GROUPS = {
    "before training": {
        "backends": ("fsam_trainers.cli.backends", "what is installed, what `auto` picks, and why"),
        "cost": ("fsam_trainers.cli.cost", "count the cost of a step relative to AdamW; nothing is trained"),
    },
    "training": {
        "train": ("fsam_trainers.cli.train", "train one model with one method, or resume or extend the run"),
        "tune": ("fsam_trainers.cli.tune", "find the best options for a method, with a tuned AdamW beside it"),
        "compare": ("fsam_trainers.cli.compare", "train several methods on equal terms: table, plot, report"),
    },
    "finished runs": {
        "runs": ("fsam_trainers.cli.runs", "a table of the runs below a folder"),
        "evaluate": ("fsam_trainers.cli.evaluate", "losses on held-out texts, after rounding and noise too"),
        "sample": ("fsam_trainers.cli.sample", "continue a text with a run or a model"),
        "export": ("fsam_trainers.cli.export", "write a model for transformers, or as safetensors"),
    },
    "understanding": {
        "sharpness": ("fsam_trainers.cli.sharpness", "what is sharp, logits or function; eigenvalues, landscapes"),
        "profile": ("fsam_trainers.cli.profile", "where time and bytes go; what the compilers make of a step"),
    },
}
COMMANDS = {name: one for group in GROUPS.values() for name, one in group.items()}
USAGE = (
    "usage: fsam COMMAND [OPTIONS]\n\n"
    + "\n".join(
        f"{title}\n" + "".join(f"  {name:11}{text}\n" for name, (_, text) in group.items())
        for title, group in GROUPS.items()
    )
    + """
fsam COMMAND --help    its options, with defaults, choices and examples
fsam --version         the versions of fsam and the frameworks

exit codes: 0 done, 1 the run diverged, 2 bad input, 128 + n stopped by signal n
"""
)


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand and exit: 0 done, 1 the run diverged, 2 bad input, 128 + n stopped by signal n (state saved).

    Args:
        arguments: of a program that calls this, which Ctrl-C then stops as well; None for those of the process.

    Raises:
        KeyboardInterrupt: in a program that calls this, when Ctrl-C has stopped the run (state saved).
    """
    own_process = arguments is None
    try:
        if arguments is None:
            arguments = sys.argv[1:]
            host_memory.keep_freed()
            platforms.skip_absent_tpu()
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="replace")  # a terminal that cannot show a sign shows ? for it
        code = _run(arguments)
        sys.stdout.flush()
        if code == 128 + signal.SIGINT and not own_process:
            raise KeyboardInterrupt
        sys.exit(code)
    except processes.AlreadyReported:
        processes.leave(2)
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        processes.leave(2)
    except OSError as error:
        is_closed = isinstance(error, BrokenPipeError)
        if not own_process or not (is_closed or is_full(error)):
            raise
        if not is_closed:
            said = "no space left for what is printed; files are written whole or not at all"
            print(f"fsam: error: {said}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        processes.leave(128 + signal.SIGPIPE if is_closed else 2)
    except KeyboardInterrupt:
        if not own_process:
            raise
        print("fsam: interrupted", file=sys.stderr)
        processes.leave(130)
    except Exception:
        if not processes.is_leaving():
            raise
        traceback.print_exc()
        processes.leave(1)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(_versions())
        return 0
    for text in arguments:
        if not is_utf8(text):
            raise UserError(f"{os.fsencode(text)!r} is not UTF-8; rename the file, or call it by a folder's name")
    name, *rest = arguments
    if name not in COMMANDS:
        raise no_command(name, list(COMMANDS), "fsam")
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except processes.Stopped as stopped:
        print("stopped; the same command resumes from there", file=sys.stderr)
        return 128 + stopped.signal


def _versions() -> str:
    """fsam's version, then the packages that it computes with and are installed."""
    parts = [f"fsam {importlib.metadata.version('fsam')}", f"python {platform.python_version()}"]
    names = ("jax", "torch", "triton", "libtpu")
    return ", ".join([*parts, *(f"{name} {version}" for name in names if (version := installed(name)))])
