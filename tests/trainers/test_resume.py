"""A run that is interrupted and resumed ends in the weights of an uninterrupted one, bit for bit."""

import fcntl
import random
import signal
import time

import pytest
from small_runs import (
    arguments,
    assert_same_weights,
    final_weights,
    fsam,
    fsam_process,
    steps_done,
    valid_steps,
    wait_for_step,
)

FRAMEWORKS = ("jax", "torch")
STEPS = 40


def run_arguments(text, out, framework):
    dropout = ("--dropout", 0.1)  # random draws must resume as well
    pace = ("--steps", STEPS, "--checkpoint-every", 5, "--evaluate-every", 11, "--probe-steps", 0)
    return arguments(text, out, "--framework", framework, *dropout, *pace)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def uninterrupted(request, text, tmp_path_factory):
    """(framework, weights, folder) of an uninterrupted run."""
    out = tmp_path_factory.mktemp(request.param) / "whole"
    command = run_arguments(text, out, request.param)
    assert fsam(*command) == 0
    return request.param, final_weights(command), out


# One interruption of a process for each framework; the others are slow.
@pytest.mark.parametrize(
    ("uninterrupted", "number"),
    [
        ("torch", signal.SIGTERM),
        pytest.param("jax", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torch", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("jax", signal.SIGINT, marks=pytest.mark.slow),
    ],
    indirect=["uninterrupted"],
)
def test_a_signal_saves_and_the_same_command_resumes(uninterrupted, number, text, tmp_path):
    framework, weights, _ = uninterrupted
    out = tmp_path / "run"
    command = run_arguments(text, out, framework)
    process = fsam_process(command)
    wait_for_step(process, out, 4)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number, process.communicate()[1]
    stopped = steps_done(out)
    assert 4 <= stopped < STEPS
    assert (out / "checkpoints" / f"step_{stopped:08d}" / "files.json").exists()
    assert fsam(*command) == 0
    assert_same_weights(final_weights(command), weights)


@pytest.mark.slow
def test_ten_random_kills_leave_the_weights_bit_identical(uninterrupted, text, tmp_path):
    framework, weights, whole = uninterrupted
    out = tmp_path / "run"
    command = run_arguments(text, out, framework)
    rng = random.Random(1)
    for _ in range(10):
        process = fsam_process(command)
        # Any moment: while it starts, in a step, in an evaluation, in the middle of a checkpoint.
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 3))
        else:
            wait_for_step(process, out, rng.randrange(STEPS - 2))
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
    process = fsam_process(command, step_seconds=0)
    assert process.wait() == 0, process.communicate()[1]
    assert_same_weights(final_weights(command), weights)
    assert not list((out / "checkpoints").glob(".writing-*"))
    assert metrics_steps(out) == metrics_steps(whole)


def metrics_steps(out):
    return [line.split(",")[0] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_kill_9_during_a_checkpoint_leaves_the_one_before(uninterrupted, text, tmp_path, monkeypatch, capsys):
    framework, weights, whole = uninterrupted
    out = tmp_path / "run"
    command = run_arguments(text, out, framework)
    monkeypatch.setenv("HINDERED_SECONDS", "0.5")
    process = fsam_process(command)
    while not list((out / "checkpoints").glob(".writing-step_00000010-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert valid_steps(out) == [5]
    assert fsam(*(x for x in command if x != "--quiet")) == 0
    assert f"resuming {out} at step 5 of {STEPS}" in capsys.readouterr().err
    assert valid_steps(out) == [35, 40]
    assert not list((out / "checkpoints").glob(".writing-*"))
    assert_same_weights(final_weights(command), weights)
    assert metrics_steps(out) == metrics_steps(whole)


def test_a_second_run_in_the_same_folder_is_refused(text, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the first run holds it
        assert fsam(*run_arguments(text, out, "torch")) == 2
    assert "another process is training in" in capsys.readouterr().err
    assert steps_done(out) == 0
