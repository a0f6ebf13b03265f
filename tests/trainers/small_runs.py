"""Small real runs for the tests of the trainers: the tiny preset on this repository's kind of text, short sequences."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import spawn

from fsam_trainers import checkpoints, cli, engine, registry
from fsam_trainers.cli.options import parse
from fsam_trainers.cli.train import Train

SMALL = ["--preset", "tiny", "--seq-len", "16", "--vocab-size", "300", "--batch", "4", "--quiet"]


def arguments(text: Path, out: Path, *more: object, command: str = "train") -> list[str]:
    """A small run's command line; later options win over the ones given here."""
    return [command, *SMALL, "--data", str(text), "--out", str(out), *map(str, more)]


def fsam(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    try:
        cli.main([str(x) for x in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("main must exit")


def hindered_process(arguments: list[str]) -> subprocess.Popen[str]:
    """The command on a disk as `hindered_run.py` has it."""
    return spawn.start(Path(__file__).with_name("hindered_run.py"), *arguments)


def fsam_process(arguments: list[str], **options) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return spawn.start("-m", "fsam_trainers.cli", *arguments, **options)


def train_options(arguments: list[str]) -> Train:
    """The options of a `fsam train` command line."""
    return parse(Train, arguments[1:], "fsam train")


def final_weights(arguments: list[str]) -> dict[str, np.ndarray]:
    """The weights in the newest checkpoint of such a run."""
    options = train_options(arguments)
    assert options.out is not None
    found = checkpoints.newest(options.out / "checkpoints", lambda text: None)
    assert found is not None
    model = registry.make(options.settings())
    model.restore(found.state)
    return {name: np.array(value) for name, value in model.weights().items()}


def save(model: engine.Engine, folder: Path) -> None:
    """The state of an only process, written before this returns."""
    writing = model.save(folder)
    writing.finish([writing.write()])


def steps_done(out: Path) -> int:
    """How many steps the metrics of a run tell of."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def valid_steps(out: Path) -> list[int]:
    """The steps whose checkpoints are valid."""
    return sorted(int(path.parent.name[5:]) for path in (out / "checkpoints").glob("step_*/files.json"))
