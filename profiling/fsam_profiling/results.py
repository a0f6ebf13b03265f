"""The file that `--json` writes: one layout for every subcommand of `fsam profile`, read by `fsam profile report`.

fsam_profile   1, the version of this layout
kind           "step", "trace", "tpu head", "tpu step", "gpu head", "gpu parameters", "check", …: what the rows are of
command        the command line that made it
machine        processor, Python, and the versions of jax, torch, triton and libtpu that are installed
about          what all rows share
rows           one object each; `docs/profiling.md` lists their fields
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from fsam_core import UserError, backends
from fsam_trainers.console import command_line
from fsam_trainers.files import write_json

LAYOUT = 1


def write(
    path: Path, kind: str, rows: list[dict[str, Any]], about: dict[str, Any] | None = None, script: str = ""
) -> None:
    """Write the file atomically; `script` names the file of `profiling/experiments/` that made it, if one did.

    Raises:
        UserError: where the disk refuses.
    """
    command = shlex.join(["python", f"profiling/experiments/{script}.py", *sys.argv[1:]]) if script else command_line()
    content = {
        "fsam_profile": LAYOUT,
        "kind": kind,
        "command": command,
        "machine": machine(),
        "about": about or {},
        "rows": rows,
    }
    write_json(path, content)


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `write` made.

    Raises:
        UserError: for a missing file, or one of another layout.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a file that --json wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON; give a file that --json of fsam profile wrote") from error
    if not isinstance(found, dict) or found.get("fsam_profile") != LAYOUT:
        raise UserError(f"{path}: is not of fsam profile's layout {LAYOUT}; write it again with --json")
    return found


def machine() -> dict[str, str]:
    """The processor, and the installed versions."""
    found = {"processor": _processor(), "python": platform.python_version()}
    names = ("jax", "torch", "triton", "libtpu")
    return found | {name: version for name in names if (version := backends.installed(name))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
