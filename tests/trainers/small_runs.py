"""Small real runs for the tests of the trainers: one block, short sequences, real text."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import spawn

from fsam_trainers import checkpoints, cli, engine, registry
from fsam_trainers.cli.options import parse
from fsam_trainers.cli.train import Train

SIZES = ["--layers", "1", "--width", "16", "--heads", "4", "--seq-len", "16", "--vocab-size", "300"]
SMALL = ["--preset", "tiny", *SIZES, "--batch", "4", "--learning-rate", "0.01", "--quiet"]


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


def fsam_process(arguments: list[str], step_seconds: float = 0.03, **options) -> subprocess.Popen[str]:
    """The command in a process of its own, by `hindered_run.py`: its steps take long enough to be interrupted."""
    env = {"HINDERED_STEP_SECONDS": str(step_seconds)}
    return spawn.start(Path(__file__).with_name("hindered_run.py"), *arguments, env=env, **options)


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


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until a run's metrics tell of this step; fails with what the process said if it has ended before."""
    while steps_done(out) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def assert_same_weights(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Equal to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def valid_steps(out: Path) -> list[int]:
    """The steps whose checkpoints are valid."""
    return sorted(int(path.parent.name[5:]) for path in (out / "checkpoints").glob("step_*/files.json"))
