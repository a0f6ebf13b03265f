"""Starts every child process of the test suite.

    start("-m", "fsam_trainers.cli", "train", ...)     a Popen with text pipes: to be signalled, killed, waited for
    run("-c", CODE)                                    waits, and fails with the child's stderr unless it exits with 0
    torchrun(2, SCRIPT, ...), jax_processes(2, SCRIPT, ...)   ranks, as launchers start them
    fork_ranks(4, function, ...)                       inside a child: gloo ranks that share one import of PyTorch

A child finds the modules that this process finds, and this one. What still runs when pytest ends is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# XLA on a CPU with its default of one device: quick to compile, one thread.
ONE_DEVICE = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=1"
NOTHING: Mapping[str, str | None] = {}
_started: list[subprocess.Popen[str]] = []


def environment(changes: Mapping[str, str | None] = NOTHING) -> dict[str, str]:
    """This process's environment, and where it finds modules, with these changes; None removes a variable."""
    paths = dict.fromkeys([str(Path(__file__).parent), *filter(None, sys.path)])
    merged = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), **changes}
    return {name: value for name, value in merged.items() if value is not None}


def start(*arguments: object, env: Mapping[str, str | None] = NOTHING, **options: Any) -> subprocess.Popen[str]:
    """`python ARGUMENTS`, running. `env` as in `environment`; options are Popen's."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(env), text=True, **(pipes | options))
    _started.append(process)
    return process


def run(
    *arguments: object, env: Mapping[str, str | None] = NOTHING, timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, ended; unless `check` is False it must have exited with 0."""
    process = start(*arguments, env=env)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def torchrun(
    ranks: int, script: Path, *arguments: object, env: Mapping[str, str | None] = NOTHING, **options: Any
) -> subprocess.Popen[str]:
    """torchrun's process, of `script` with these arguments; its ranks write to its stdout."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    # A long timeout, because tests share two cores and ranks start far apart there.
    patient = {"FSAM_RANK_TIMEOUT": os.environ.get("FSAM_RANK_TIMEOUT", "300")}
    return start(*launcher, script, *arguments, env={**patient, **env}, stderr=subprocess.STDOUT, **options)


@contextlib.contextmanager
def jax_processes(
    count: int, script: Path, *arguments: object, env: Mapping[str, str | None] = NOTHING
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one JAX run, one device each, joined at a port of their own; killed at the end."""
    same = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    rank = lambda i: {**same, "XLA_FLAGS": ONE_DEVICE, **env, "RANK": str(i), "LOCAL_RANK": str(i)}
    processes = [start(script, *arguments, env=rank(i)) for i in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def fork_ranks(count: int, function: Callable[..., None], *arguments: object) -> int:
    """This process forked into ranks, each calling function(rank, store, *arguments); 0 if none of them failed.

    `store` is a path for `init_process_group(init_method=f"file://{store}")`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=function, args=(i, f"{folder}/store", *arguments)) for i in range(count)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return int(any(rank.exitcode for rank in ranks))


def rank_pids(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id, of those that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(x[5:]) for x in variables if x.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, int(pid))
    return found


def alive(pid: int) -> bool:
    """Whether the process runs: a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@atexit.register
def _kill_all() -> None:
    for process in _started:
        if process.poll() is None:
            process.kill()
