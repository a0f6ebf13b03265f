"""`fsam train` on a stream: after any interruption the same command resumes and ends in the same weights."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rank_runs import figures, jax_processes, torchrun
from small_runs import arguments, assert_same_weights, final_weights, fsam, fsam_process, steps_done, wait_for_step

from fsam_trainers import metrics

STEPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Real text in shards: the functions of a few modules that every Python has, a row each."""
    folder = tmp_path_factory.mktemp("shards")
    library = Path(json.__file__).parent.parent
    for name in ("argparse", "ast", "calendar", "csv", "difflib", "heapq"):
        parts = (library / f"{name}.py").read_text(encoding="utf-8").split("\ndef ")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return folder


def command_of(shards: Path, out: Path, framework: str, *more: object) -> list[str]:
    pace = ("--steps", STEPS, "--checkpoint-every", 5, "--evaluate-every", 29, "--probe-steps", 0)
    streamed = ("--stream", "yes", "--shuffle-buffer", 32, "--data-workers", 1, "--framework", framework)
    return arguments(shards, out, *pace, *streamed, *more)


def whole_run(shards: Path, out: Path, framework: str) -> dict[str, np.ndarray]:
    command = command_of(shards, out, framework, "--data-workers", 0)
    assert fsam(*command) == 0
    return final_weights(command)


def children(pid: int) -> list[int]:
    """The tokenizing processes of a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "fsam_trainers.data.worker" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill_worker(shards: Path, out: Path, framework: str, step: int, capsys, monkeypatch) -> None:
    """A run whose tokenizing process is killed: the error names the shard."""
    killed = []

    def kill() -> None:
        while steps_done(out) < step:
            time.sleep(0.005)
        killed.extend(children(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    killer, write = threading.Thread(target=kill, daemon=True), metrics.JsonLines.write
    with monkeypatch.context() as patch:
        patch.setattr(metrics.JsonLines, "write", lambda *given: (write(*given), time.sleep(0.03)))
        killer.start()
        assert fsam(*command_of(shards, out, framework)) == 2
    killer.join()
    (line,) = capsys.readouterr().err.splitlines()
    (worker,) = killed
    assert f"process {worker} was killed by signal 9" in line
    assert str(shards) in line
    assert ".jsonl, from row " in line


def kill_run(shards: Path, out: Path, framework: str, step: int) -> None:
    process = fsam_process(command_of(shards, out, framework))
    wait_for_step(process, out, step)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert len(workers) == 1
    assert gone(workers)


@pytest.mark.slow
def test_a_killed_worker_and_run_leave_the_weights_identical(shards, tmp_path, capsys, monkeypatch):
    weights = whole_run(shards, tmp_path / "whole", "torch")
    out = tmp_path / "run"
    kill_worker(shards, out, "torch", 7, capsys, monkeypatch)
    kill_run(shards, out, "torch", 18)
    command = command_of(shards, out, "torch", "--data-workers", 0)
    assert fsam(*command) == 0
    assert_same_weights(final_weights(command), weights)


def test_a_stream_and_a_stored_corpus_are_different_runs(shards, tmp_path, capsys):
    out = tmp_path / "run"
    command = command_of(shards, out, "torch", "--steps", 2, "--data-workers", 0)
    assert fsam(*command) == 0
    assert fsam(*command, "--shuffle-buffer", 33) == 2
    assert "--shuffle-buffer: got 33, the checkpoint was made with 32" in capsys.readouterr().err
    assert fsam(*command, "--stream", "no") == 2
    assert f"--out: {out} holds a run on other data" in capsys.readouterr().err
    assert fsam(*command, "--max-tokens", 1000) == 2
    assert "--max-tokens 1000: a stream has no bound" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_random_kills_leave_the_weights_bit_identical(framework, shards, tmp_path):
    weights = whole_run(shards, tmp_path / "whole", framework)
    out = tmp_path / "run"
    draw = random.Random(framework)
    for _ in range(6):
        process = fsam_process(command_of(shards, out, framework))
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 3))
        else:
            wait_for_step(process, out, draw.randrange(STEPS - 2))
            time.sleep(draw.uniform(0, 0.05))
        workers = children(process.pid)
        process.kill()
        process.communicate(timeout=60)
        assert gone(workers)
    command = command_of(shards, out, framework)
    process = fsam_process(command)
    assert process.wait() == 0, process.communicate()[1]
    assert_same_weights(final_weights(command), weights)


@pytest.mark.slow
def test_a_signal_saves_and_the_stream_resumes(shards, tmp_path):
    weights = whole_run(shards, tmp_path / "whole", "jax")
    out = tmp_path / "run"
    process = fsam_process(command_of(shards, out, "jax"), start_new_session=True)
    wait_for_step(process, out, 13)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does; the tokenizing process is not to die of it
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.communicate()[1]
    command = command_of(shards, out, "jax")
    assert fsam(*command) == 0
    assert_same_weights(final_weights(command), weights)


def losses(out: Path) -> list[float]:
    return list(figures(out, ["loss"]).values())


@pytest.mark.slow
def test_a_stream_of_two_ranks_resumes_on_one(shards, tmp_path):
    more = ("--micro-batches", 2, "--batch", 8, "--warmup", 2)

    def run(out: Path, steps: int) -> None:
        # The learning rate depends on --steps: the shorter run is one that is stopped on its way.
        process = torchrun(2, command_of(shards, out, "torch", *more))
        if steps < STEPS:
            wait_for_step(process, out, steps)
            process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=300)
        assert steps < STEPS or process.returncode == 0, said

    run(tmp_path / "whole", STEPS)
    run(tmp_path / "run", 12)
    state = stream_state(tmp_path / "run")
    assert state["of"] == 2
    assert state["parts"].keys() == {"0", "1"}
    assert fsam(*command_of(shards, tmp_path / "run", "torch", *more)) == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=2e-5)


def stream_state(out: Path) -> dict:
    """Where the newest checkpoint stands in the stream."""
    newest = max((out / "checkpoints").glob("step_*"))
    return json.loads((newest / "run.json").read_text())["stream"]


@pytest.fixture(params=["jsonl", "parquet"])
def rows(request, shards, tmp_path) -> Path:
    """The shards in that format; of Parquet in row groups that end within a buffer."""
    if request.param == "jsonl":
        return shards
    parquet = pytest.importorskip("pyarrow.parquet")
    json_reader = pytest.importorskip("pyarrow.json")
    folder = tmp_path / "parquet"
    folder.mkdir()
    for path in shards.glob("*.jsonl"):
        parquet.write_table(json_reader.read_json(path), folder / f"{path.stem}.parquet", row_group_size=7)
    return folder


@pytest.mark.slow
def test_two_jax_processes_resume_a_stream_at_the_exact_token(rows, tmp_path):
    def run(out: Path, stop_at: int | None = None) -> list[int]:
        with jax_processes(2, command_of(rows, out, "jax", "--data-parallel", 2)) as processes:
            if stop_at:
                wait_for_step(processes[1], out, stop_at)
                processes[1].send_signal(signal.SIGTERM)
            said = [process.communicate(timeout=300) for process in processes]
        assert not any("Traceback" in errors for _, errors in said), said
        return [process.returncode for process in processes]

    whole, stopped = tmp_path / "whole", tmp_path / "run"
    assert run(whole) == [0, 0]
    assert run(stopped, 13) == [128 + signal.SIGTERM] * 2
    assert 13 <= steps_done(stopped) < STEPS
    state = stream_state(stopped)
    assert state["of"] == 2
    assert state["parts"].keys() == {"0", "1"}
    assert run(stopped) == [0, 0]
    assert stream_state(stopped) == stream_state(whole)
    assert losses(stopped) == losses(whole)
    command = command_of(rows, whole, "jax", "--data-parallel", 2)
    weights = final_weights(command)
    assert_same_weights(final_weights([str(stopped) if x == str(whole) else x for x in command]), weights)
