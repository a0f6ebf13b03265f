"""Metrics of a run as JSON lines, one object a step, consistent with its checkpoints; TensorBoard and W&B beside them.

metrics.jsonl is the record that a resumed run reads. A board receives the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from fsam_core import UserError, backends
from fsam_trainers.files import disk_errors, finite, write_text

Log = Literal["jsonl", "tensorboard", "wandb"]


class Lines(Protocol):
    """Where the metrics go."""

    def write(self, value: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends objects to a file.

    Opened for a run that resumes at `step`, it first deletes the lines of later steps, and what cannot be read.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        self.path = path
        with disk_errors(path):
            lines = _lines(path)
        found = _objects(lines)
        if len(found) < len(lines):
            warn(f"{path}: {len(lines) - len(found)} of its {len(lines)} lines cannot be read and are left out")
        write_text(path, "".join(_line(x) for x in found if x["step"] <= step))
        # Line-buffered: `tail -f` shows each finished step, and a kill loses none.
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, value: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(_line(value))

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()


class TensorBoard:
    """The same in OUT/tensorboard. It is rewritten from metrics.jsonl at each start, so no step is there twice.

    Raises:
        UserError: when tensorboard is not installed.
    """

    def __init__(self, out: Path) -> None:
        backends.require("tensorboard.summary")
        from tensorboard.summary import Writer

        with disk_errors(out):
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
        self._writer = Writer(str(out / "tensorboard"))
        for line in read(out / "metrics.jsonl"):
            self.write(line)
        self._writer.flush()

    def write(self, value: dict[str, Any]) -> None:
        for name, number in _numbers(value).items():
            self._writer.add_scalar(name, number, value["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same as a run of W&B, which a resumed run continues. WANDB_MODE=offline keeps it in OUT/wandb.

    Its number of a step only grows: W&B ignores steps that a resumed run takes again. They are equal to the bit.

    Raises:
        UserError: when wandb is not installed or refuses.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        backends.require("wandb")
        import wandb

        name = out / "wandb.id"
        if not name.exists():
            write_text(name, uuid.uuid4().hex)
        kept = name.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project="fsam", id=kept, name=out.name, dir=str(out), config=dict(settings), resume="allow"
            )
        except wandb.errors.Error as error:
            raise UserError(f"--log wandb: {error}; WANDB_MODE=offline needs no account") from error

    def write(self, value: dict[str, Any]) -> None:
        self._run.log(_numbers(value), step=value["step"])

    def close(self) -> None:
        self._run.finish()


class Several:
    """Writes to all of these."""

    def __init__(self, *lines: Lines) -> None:
        self._lines = lines

    def write(self, value: dict[str, Any]) -> None:
        for one in self._lines:
            one.write(value)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for one in self._lines:
                stack.callback(one.close)


def open_lines(out: Path, step: int, log: str, settings: Mapping[str, Any], warn: Callable[[str], None]) -> Lines:
    """The metrics of a run that resumes at `step`: OUT/metrics.jsonl, and with `log` a board beside it.

    Raises:
        UserError: when the board's library is not installed or refuses, and when the disk does.
    """
    lines = JsonLines(out / "metrics.jsonl", step, warn)
    if log == "tensorboard":
        return Several(lines, TensorBoard(out))
    return Several(lines, WeightsAndBiases(out, settings)) if log == "wandb" else lines


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that have a "step"; none without a file. Other lines are left out."""
    return _objects(_lines(path))


def _objects(lines: Iterable[str]) -> list[dict[str, Any]]:
    values = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                values.append(value)
    return values


def _lines(path: Path) -> list[str]:
    """The lines of a file, but for a last one that a kill has cut."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in text.split("\n")[:-1] if line]


def _line(value: dict[str, Any]) -> str:
    return json.dumps(finite(value), allow_nan=False) + "\n"


def _numbers(value: dict[str, Any]) -> dict[str, float]:
    """What can be drawn: finite numbers, true and false. The seconds are left out: a step may have two lines."""
    drawn = {k: float(v) for k, v in value.items() if k not in ("step", "seconds") and isinstance(v, int | float)}
    return {k: v for k, v in drawn.items() if math.isfinite(v)}
