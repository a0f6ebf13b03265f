"""The command in several processes that train together, as launchers start them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# For XLA on a CPU, with the one device it has unless told otherwise: quick to compile, one thread.
FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=1"
HINDERED = "hindered_run.py"  # on the machine's own disk unless HINDERED_ variables are set


def torchrun(ranks: int, command: Sequence[str], script: str = HINDERED, **options) -> subprocess.Popen:
    """torchrun's process, of `script` with these arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, str(Path(__file__).with_name(script)), *command],
        # Patient, as tests share two cores and ranks start far apart there.
        env={"FSAM_RANK_TIMEOUT": "300", **os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def rank_pids(process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id, of those that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(x[5:]) for x in variables if x.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, int(pid))
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def figures(out: Path, names: Sequence[str] = ("loss", "val_loss", "grad_norm")) -> dict[tuple[int, str], float]:
    """(step, name) -> what the metrics of a run say."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return {(x["step"], name): x[name] for x in lines for name in names if name in x}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def jax_processes(count: int, command: Sequence[str], script: str = HINDERED, **environment: str):
    """The processes of one JAX run, one device each, joined at a port of their own; killed at the end."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "XLA_FLAGS": FLAGS}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *command],
            env={**os.environ, **where, **environment, "RANK": str(i), "LOCAL_RANK": str(i), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
