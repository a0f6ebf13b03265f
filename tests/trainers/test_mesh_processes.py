"""The JAX trainer's engine over several processes: real ones, that talk through gloo."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import spawn
from mesh_child import norm, settings, train
from mesh_process import CHANGES, SHAPE, STEPS
from rank_runs import figures, jax_processes
from small_runs import arguments, final_weights, fsam, steps_done, valid_steps

from fsam_trainers.jax.engine import JaxEngine

PROCESS = Path(__file__).with_name("mesh_process.py")


@pytest.mark.slow
def test_two_processes_train_save_and_resume_like_one(tmp_path):
    port = spawn.free_port()
    processes = [spawn.start(PROCESS, rank, 2, port, tmp_path) for rank in range(2)]
    said = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
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
def test_two_processes_of_the_command_resume_in_one(text, tmp_path):
    """Started as a launcher starts them; one of them alone writes."""
    pace = ("--steps", 12, "--checkpoint-every", 6, "--evaluate-every", 6, "--probe-steps", 0)
    losses = {}
    for name, count in (("one", 1), ("two", 2)):
        out = tmp_path / name
        command = arguments(text, out, *pace, "--data-parallel", count)
        with jax_processes(count, command) as processes:
            said = [process.communicate(timeout=900)[0] for process in processes]
            assert [process.returncode for process in processes] == [0] * count
        assert ["parameters" in text for text in said] == [True, *[False] * (count - 1)]
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
def test_a_full_disk_of_one_process_ends_both(rank, text, tmp_path):
    out, count = tmp_path / "run", 2
    larger = ("--layers", 4, "--width", 128)
    pace = ("--method", "adamw", "--steps", 3000, "--checkpoint-every", 10, "--probe-steps", 0, *larger)
    full = {"HINDERED_RANK": str(rank), "HINDERED_BYTES": "1000000"}  # metrics fit in that, half of the state does not
    with jax_processes(count, arguments(text, out, *pace, "--data-parallel", count), **full) as processes:
        said = [process.communicate(timeout=240)[1] for process in processes]
        assert processes[rank].returncode == 2, said
        assert processes[1 - rank].returncode != 0, said
    (line,) = [x for x in "".join(said).splitlines() if x.startswith("fsam: error")]
    target = out / "checkpoints" / "step_00000010"
    assert line == f"fsam: error: cannot write {target}: no space left for it; nothing was left half-written"
    assert list((out / "checkpoints").iterdir()) == []


MINUTE = 60
STARTING, STEPPING, WRITING = "while it starts", "between steps", "while a checkpoint is written"


def wait_for(processes, until) -> None:
    while not until():
        assert not any(process.poll() for process in processes), [x.communicate() for x in processes]
        time.sleep(0.01)


def wait_for_phase(processes, out: Path, phase: str, rng: random.Random) -> None:
    """Until a random moment of the phase; between steps, once there is another checkpoint than there was."""
    if phase == STARTING:
        time.sleep(rng.uniform(0, 10))
        return
    sealed, began = valid_steps(out), steps_done(out)
    wait_for(processes, lambda: steps_done(out) not in (0, began))  # the lines after the last checkpoint go first
    if phase == STEPPING:
        wait_for(processes, lambda: valid_steps(out)[-1:] != sealed[-1:])
        target = steps_done(out) + rng.randrange(5)
        wait_for(processes, lambda: steps_done(out) >= target)
        time.sleep(rng.uniform(0, 0.1))
        return
    wait_for(processes, lambda: list((out / "checkpoints").glob(".writing-*")))
    time.sleep(rng.uniform(0, 2 * float(os.environ["HINDERED_SECONDS"])))


@pytest.mark.slow
def test_a_killed_process_ends_both_and_loses_no_checkpoint(text, tmp_path, monkeypatch):
    steps = 100
    pace = ("--steps", steps, "--checkpoint-every", 10, "--evaluate-every", 20, "--probe-steps", 0)
    command_of = lambda out: [x for x in arguments(text, out, *pace, "--data-parallel", 2) if x != "--quiet"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    monkeypatch.setenv("FSAM_RANK_TIMEOUT", "30")

    def to_the_end(out: Path) -> list[str]:
        with jax_processes(2, command_of(out)) as processes:
            said = [process.communicate(timeout=5 * MINUTE)[1] for process in processes]
            assert [process.returncode for process in processes] == [0, 0], said
        return said

    to_the_end(whole)
    # Half a second in each thread: a kill "while a checkpoint is written" is one before, in or between its phases.
    monkeypatch.setenv("HINDERED_SECONDS", "0.5")
    rng = random.Random(0)
    for phase, victim in ((STEPPING, 0), (WRITING, 1), (STARTING, 0), (WRITING, 0), (STARTING, 1), (STEPPING, 1)):
        sealed = valid_steps(out)
        with jax_processes(2, command_of(out)) as processes:
            wait_for_phase(processes, out, phase, rng)
            processes[victim].kill()
            began = time.monotonic()
            processes[1 - victim].wait(timeout=2 * MINUTE)
            assert time.monotonic() - began < MINUTE
            said = [process.communicate()[1] for process in processes]
        assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
        # Where the main process is gone, JAX's own client mostly is the first to notice, and aborts.
        assert re.search("another rank is gone|another task died", said[1 - victim]), said
        assert set(sealed[-1:]) <= set(valid_steps(out)), "a valid checkpoint was lost"
        if phase != STARTING and sealed:
            assert f"resuming {out} at step {sealed[-1]} of {steps}" in said[0], said
    sealed = valid_steps(out)
    assert 20 <= sealed[-1] < steps
    said = to_the_end(out)
    assert f"resuming {out} at step {sealed[-1]} of {steps}" in said[0], said
    assert not list((out / "checkpoints").glob(".writing-*"))
    assert figures(out) == figures(whole)
    mine, other = (final_weights(command_of(x)) for x in (out, whole))
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_does_not_answer_times_out(victim, text, tmp_path):
    out = tmp_path / "run"
    command = arguments(text, out, "--method", "adamw", "--steps", 5000, "--probe-steps", 0, "--data-parallel", 2)
    with jax_processes(2, command, FSAM_RANK_TIMEOUT="10") as processes:
        wait_for(processes, lambda: steps_done(out) >= 5)
        processes[victim].send_signal(signal.SIGSTOP)
        _, said = processes[1 - victim].communicate(timeout=MINUTE)
        assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
        assert "another task died" in said, said
