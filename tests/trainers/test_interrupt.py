"""Ctrl-C while a test trains stops pytest, and not that test alone."""

import signal
import time

import pytest
import spawn
from small_runs import steps_done

TESTS = """
from pathlib import Path
from small_runs import arguments, fsam

def test_that_trains():
    more = ("--framework", "torch", "--method", "adamw", "--steps", 100_000, "--checkpoint-every", 0)
    fsam(*arguments(Path({text!r}), Path({out!r}), *more, "--evaluate-every", 0))

def test_that_comes_after():
    Path({after!r}).touch()
"""


@pytest.mark.slow
def test_ctrl_c_in_a_test_that_trains_stops_pytest(text, tmp_path):
    out, after = tmp_path / "run", tmp_path / "after"
    (tmp_path / "test_child.py").write_text(TESTS.format(text=str(text), out=str(out), after=str(after)))
    process = spawn.start("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path / "test_child.py")
    while steps_done(out) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said  # pytest's code for an interrupted session
    assert "KeyboardInterrupt" in said
    assert not after.exists()
    stopped = steps_done(out)
    assert (out / "checkpoints" / f"step_{stopped:08d}" / "files.json").exists(), said
