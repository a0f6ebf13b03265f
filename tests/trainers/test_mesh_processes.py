"""The JAX trainer's engine over several processes: real ones, that talk through gloo."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mesh_child import FLAGS, norm, settings, train
from mesh_process import CHANGES, SHAPE, STEPS
from small_runs import arguments, fsam

from fsam_trainers.jax_trainer import JaxEngine

PROCESS = Path(__file__).with_name("mesh_process.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_save_and_go_on_as_one_does(tmp_path):
    port = str(free_port())
    command = lambda rank: [sys.executable, str(PROCESS), str(rank), "2", port, str(tmp_path)]
    processes = [subprocess.Popen(command(rank)) for rank in range(2)]
    try:
        assert [process.wait(timeout=900) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = JaxEngine(settings(**CHANGES))
    start = alone.weights()
    expected = train(alone, 0, STEPS)
    np.testing.assert_allclose(json.loads((tmp_path / "reports.json").read_text()), expected, rtol=1e-5)
    end = alone.weights()
    with np.load(tmp_path / "weights.npz") as weights:
        assert norm(dict(weights), end) < 1e-5 * norm(end, start)
    # And what they left is a checkpoint for one process as well.
    other = JaxEngine(settings(SHAPE, **CHANGES))
    other.restore(tmp_path / "state")
    assert int(other.state.opt_state.count) == STEPS // 2


@pytest.mark.slow
def test_the_command_in_two_processes_trains_as_in_one_and_goes_on_in_one(text, tmp_path):
    """Started as a launcher starts them; one of them alone writes."""
    pace = ("--steps", 12, "--checkpoint-every", 6, "--evaluate-every", 6, "--probe-steps", 0)
    losses = {}
    for name, count in (("one", 1), ("two", 2)):
        out, port = tmp_path / name, str(free_port())
        mesh = ("--data-parallel", count)
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        environments = [
            {**os.environ, **where, "RANK": str(i), "LOCAL_RANK": str(i), "XLA_FLAGS": FLAGS} for i in range(count)
        ]
        command = [sys.executable, "-m", "fsam_trainers.cli", *arguments(text, out, *pace, *mesh)]
        processes = [subprocess.Popen(command, env=x, stdout=subprocess.PIPE, text=True) for x in environments]
        try:
            said = [process.communicate(timeout=900)[0] for process in processes]
            assert [process.returncode for process in processes] == [0] * count
        finally:
            for process in processes:
                process.kill()
        assert ["params" in text for text in said] == [True, *[False] * (count - 1)]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [x["loss"] for x in lines if "loss" in x] + [x["val_loss"] for x in lines if "val_loss" in x]
    assert len(losses["one"]) == 12 + 2
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-4)
    same = arguments(text, tmp_path / "two", *pace)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000012")
    assert fsam(*same) == 0  # from step 6, on one device
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([x["loss"] for x in lines if "loss" in x], losses["one"][:12], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_processs_part_ends_both_with_one_sentence(rank, text, tmp_path):
    out, count = tmp_path / "run", 2
    pace = ("--method", "adamw", "--steps", 3000, "--checkpoint-every", 10, "--probe-steps", 0)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "XLA_FLAGS": FLAGS}
    full = {"HINDERED_RANK": str(rank), "HINDERED_BYTES": "1000000"}  # metrics fit in that, half of the state does not
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("hindered_run.py")),
                *arguments(text, out, *pace, "--data-parallel", count),
            ],
            env={**os.environ, **where, **full, "RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
        assert processes[rank].returncode == 2, said
        assert processes[1 - rank].returncode != 0, said
    finally:
        for process in processes:
            process.kill()
    (line,) = [x for x in "".join(said).splitlines() if x.startswith("fsam: error")]
    target = out / "checkpoints" / "step_00000010"
    assert line == f"fsam: error: cannot write {target}: no space left for it; nothing was left half-written"
    assert list((out / "checkpoints").iterdir()) == []
