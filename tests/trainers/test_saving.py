"""Checkpoints that are written in the background."""

from __future__ import annotations

import errno
import json
import signal
import time

import jax
import numpy as np
import pytest
from small_runs import arguments, fsam, fsam_process, steps_done, train_options, valid_steps

from fsam_core import UserError
from fsam_trainers import checkpoints, registry, saving
from fsam_trainers.processes import AlreadyReported, Processes
from fsam_trainers.torch.engine import TorchEngine

STEPS, EVERY = 9, 3


def command_of(text, out, *more):
    pace = ("--steps", STEPS, "--checkpoint-every", EVERY, "--keep", 9, "--evaluate-every", 1, "--probe-steps", 0)
    return arguments(text, out, "--evaluation-batches", 1, *pace, *more)


def wait_until(condition, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def states(command, out) -> dict[int, list[np.ndarray]]:
    """Step -> all weights and moments in its checkpoint, and where the run said it stood."""
    settings = train_options(command).settings()
    model = registry.make(settings)
    found = {}
    for folder in sorted((out / "checkpoints").iterdir()):
        model.restore(folder / "state")
        if settings.framework == "jax":
            leaves = [np.array(x) for x in jax.tree.leaves(model.state)]
        else:
            leaves = [x.numpy().copy() for x in jax.tree.leaves(model._state()) if hasattr(x, "numpy")]
        progress = json.loads((folder / "run.json").read_text())["progress"]
        found[progress["step"]] = [*leaves, np.array([progress["val_loss"], progress["checkpoints"]])]
    return found


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_training_continues_while_a_checkpoint_is_written(framework, text, tmp_path, monkeypatch):
    """Each phase of writing waits until training has taken a step; the checkpoint is bit-identical to its own step."""
    command = lambda out: command_of(text, out, "--framework", framework, "--method", "adamw", "--ema", 0.9)
    in_background, save = saving._in_background, saving.Saver.save
    out, still = tmp_path / "on", tmp_path / "still"
    phases = {}

    def gated(function, target):
        step = int(target.name.removeprefix("step_"))
        phases[step] = phases.get(step, 0) + 1

        def later():
            reached = min(step + phases[step], STEPS)
            wait_until(lambda: steps_done(out) >= reached, f"no step was taken while {target} was written")
            return function()

        return in_background(later, target)

    monkeypatch.setattr(saving, "_in_background", gated)
    assert fsam(*command(out)) == 0
    assert phases == {3: 2, 6: 2, 9: 2}
    monkeypatch.setattr(saving, "_in_background", in_background)
    monkeypatch.setattr(saving.Saver, "save", lambda self, *args: (save(self, *args), self.wait()))
    assert fsam(*command(still)) == 0
    mine, expected = states(command(out), out), states(command(still), still)
    assert mine.keys() == expected.keys() == {3, 6, 9}
    for step in mine:
        assert len(mine[step]) > 20
        for a, b in zip(mine[step], expected[step], strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_a_checkpoint_cost_the_loop_is_reported(text, tmp_path, monkeypatch):
    save, figures = saving.Saver.save, tmp_path / "figures.json"
    monkeypatch.setattr(saving.Saver, "save", lambda self, *args: (time.sleep(0.2), save(self, *args)))
    command = command_of(text, tmp_path / "run", "--framework", "torch", "--method", "adamw", "--json", figures)
    began = time.perf_counter()
    assert fsam(*command) == 0
    assert 200 <= json.loads(figures.read_text())["checkpoint_ms"] < 1000 * (time.perf_counter() - began) / 3


def test_a_disk_that_fills_during_training_costs_one_checkpoint(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    seal = checkpoints.seal

    def full(folder, target, *more):
        if target.name == "step_00000006":
            wait_until(lambda: steps_done(out) >= 7, "no step was taken meanwhile")
            (folder / "files.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, target, *more)

    command = command_of(text, out, "--framework", "torch", "--method", "adamw")
    monkeypatch.setattr(checkpoints, "seal", full)
    assert fsam(*command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    target = out / "checkpoints" / "step_00000006"
    assert line == f"fsam: error: cannot write {target}: no space left for it; nothing was left half-written"
    assert 7 <= steps_done(out) <= STEPS
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000003"]
    monkeypatch.setattr(checkpoints, "seal", seal)
    assert fsam(*command) == 0
    assert valid_steps(out) == [3, 6, 9]


def test_an_error_in_a_step_leaves_the_pending_checkpoint_valid(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    in_background = saving._in_background

    def late(function, target):
        def later():
            wait_until(lambda: steps_done(out) >= 4, "no step was taken meanwhile")
            time.sleep(0.2)
            return function()

        return in_background(later, target)

    def damaged(self, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "_in_background", late)
    step = TorchEngine.step
    monkeypatch.setattr(TorchEngine, "step", lambda self, *args: (damaged if args[1] == 4 else step)(self, *args))
    with pytest.raises(OSError, match="Input/output"):
        fsam(*command_of(text, out, "--framework", "torch", "--method", "adamw"))
    assert valid_steps(out) == [3]


@pytest.mark.slow
def test_a_signal_during_a_checkpoint_leaves_both_valid(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setenv("HINDERED_SECONDS", "1")
    more = ("--framework", "torch", "--method", "adamw", "--steps", 2000, "--checkpoint-every", 20)
    process = fsam_process(command_of(text, out, *more, "--evaluate-every", 0))
    try:
        wait_until(lambda: list((out / "checkpoints").glob(".writing-*")), "no checkpoint was begun")
        wait_until(lambda: steps_done(out) > 20, "no step was taken while it was written")
        assert valid_steps(out) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.communicate()[1]
    finally:
        process.kill()
        process.communicate()
    stopped = steps_done(out)
    assert valid_steps(out) == ([20, stopped] if stopped % 20 else [20])
    assert 20 < stopped < 2000
    assert not list((out / "checkpoints").glob(".writing-*"))


def test_only_the_first_ranks_error_is_reported():
    """`from_all` with several errors: the first rank raises its own, the others AlreadyReported."""

    class Third(Processes):
        rank, count = 2, 3
        others = (("a", None), (None, "the disk is full"))

        def gathered(self, value):
            return [*self.others, value]

    def full():
        raise UserError("this one too")

    with pytest.raises(AlreadyReported, match="the disk is full"):
        Third().from_all(full)
    with pytest.raises(AlreadyReported, match="the disk is full"):
        Third().from_all(lambda: "c")
    Third.others = (("a", None), ("b", None))
    assert Third().from_all(lambda: "c") == ["a", "b", "c"]
    with pytest.raises(UserError, match="this one too") as raised:
        Third().from_all(full)
    assert not isinstance(raised.value, AlreadyReported)
