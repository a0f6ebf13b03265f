"""Metrics of a run as JSON lines, one object a step, consistent with its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsam_trainers.files import disk_errors, finite, write_text


class JsonLines:
    """Appends objects to a file. Opened for a run that resumes at `step`, it first deletes the lines of later steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read(path) if line["step"] <= step] if path.exists() else []
        write_text(path, "".join(_line(x) for x in kept))
        # Line-buffered: `tail -f` shows each finished step, and a kill loses none.
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, value: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(_line(value))

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without an incomplete last line."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values


def _line(value: dict[str, Any]) -> str:
    return json.dumps(finite(value), allow_nan=False) + "\n"
