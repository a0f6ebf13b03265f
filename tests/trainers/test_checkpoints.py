"""Checkpoints that are damaged, another run's, or cannot be written."""

import contextlib
import hashlib
import json
import resource
import shutil

import pytest
from small_runs import arguments, final_weights, fsam, steps_done

from fsam_core import UserError
from fsam_trainers import checkpoints, files

FRAMEWORKS = ("jax", "torch")


@pytest.fixture(params=FRAMEWORKS, scope="module")
def finished(request, text, tmp_path_factory):
    """(command, folder) of a finished run with two checkpoints."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    more = ("--framework", request.param, "--steps", 6, "--checkpoint-every", 3, "--probe-steps", 0)
    command = arguments(text, out, "--method", "adamw", *more)
    assert fsam(*command) == 0
    return command, out


@pytest.fixture
def run(finished, tmp_path):
    """The same, copied so that it may be spoilt."""
    command, out = finished
    mine = tmp_path / "run"
    shutil.copytree(out, mine)
    return [str(mine) if x == str(out) else x for x in command], mine


def newest(out):
    return sorted((out / "checkpoints").glob("step_*"))[-1]


def a_big_file(folder):
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOIL = {
    "a flipped bit": lambda folder: flip(a_big_file(folder)),
    "a truncated file": lambda folder: a_big_file(folder).write_bytes(a_big_file(folder).read_bytes()[:-1]),
    "a missing file": lambda folder: a_big_file(folder).unlink(),
    "no list of files": lambda folder: (folder / "files.json").unlink(),
    "a list that is not JSON": lambda folder: (folder / "files.json").write_text("{"),
    "an empty run.json": lambda folder: (folder / "run.json").write_text(""),
}


def found_instead(out) -> str:
    """The warning about the newest checkpoint; checks that the one before it is used."""
    said = []
    found = checkpoints.newest(out / "checkpoints", said.append)
    assert found is not None
    assert found.run["progress"]["step"] == 3
    (warning,) = said
    return warning


@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_checkpoint_is_named_and_passed_over(how, run):
    _, out = run
    SPOIL[how](newest(out))
    assert f"checkpoint {newest(out)} is damaged" in found_instead(out)


def test_a_run_resumes_from_the_one_before_a_damaged(run, capsys):
    command, out = run
    weights = final_weights(command)
    SPOIL["a truncated file"](newest(out))
    assert fsam(*[x for x in command if x != "--quiet"]) == 0
    errors = capsys.readouterr().err
    assert f"checkpoint {newest(out)} is damaged" in errors
    assert "resuming" in errors
    assert "at step 3 of 6" in errors
    again = final_weights(command)
    assert all((again[name] == weights[name]).all() for name in weights)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(run, capsys):
    command, out = run
    for folder in (out / "checkpoints").glob("step_*"):
        flip(a_big_file(folder))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert fsam(*command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--out" in line
    assert "no checkpoint" in line
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vocab-size", "310"], "model.vocab_size 300 (now 310)"),
        (["--seq-len", "8"], "model.seq_len 16 (now 8)"),
        (["--no-tied"], "model.tied True (now False)"),
        (["--steps", "5"], "steps 6 (now 5)"),
        (["--method", "sam"], "method 'adamw' (now 'sam')"),
        (["--seed", "1"], "seed 0 (now 1)"),
        (["--learning-rate", "0.5"], "learning_rate 0.01 (now 0.5)"),
    ],
)
def test_resuming_with_other_settings_is_refused(more, said, run, capsys):
    command, out = run
    before = steps_done(out)
    assert fsam(*command, *more) == 2
    assert said in capsys.readouterr().err
    assert steps_done(out) == before


def test_resuming_on_other_data_is_refused(run, tmp_path, capsys):
    command, _ = run
    other = tmp_path / "other.txt"
    other.write_text("some other words, again and again\n" * 200)
    assert fsam(*command, "--data", other) == 2
    assert "other data" in capsys.readouterr().err


def test_a_checkpoint_larger_than_the_free_space_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"it takes 1,000,000,000 MB and [\d,]+ MB are free"):
        checkpoints.begin(tmp_path, 1, size=10**15)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_files(monkeypatch):
    """From the first checkpoint on no file may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin = checkpoints.begin

    def limit_and_begin(*given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return begin(*given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "begin", limit_and_begin)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_disk_that_refuses_costs_only_that_checkpoint(framework, text, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    command = arguments(text, out, "--framework", framework, "--method", "adamw", "--steps", 6, "--probe-steps", 0)
    with small_files(monkeypatch):
        assert fsam(*command) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [x for x in errors.splitlines() if x.startswith("fsam: error")]
    assert line.startswith("fsam: error: cannot write")
    assert line.endswith("no space left for it; nothing was left half-written")
    assert list((out / "checkpoints").glob("*")) == []
    assert fsam(*command) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_folders_of_other_names_are_the_users(text, tmp_path, capsys):
    out = tmp_path / "run"
    command = arguments(text, out, "--framework", "torch", "--method", "adamw", "--probe-steps", 0, "--keep", 1)
    assert fsam(*command, "--steps", 3) == 0
    kept = ["step_00000003.bak", "step_best", "step_old"]
    for name in kept:
        shutil.copytree(out / "checkpoints" / "step_00000003", out / "checkpoints" / name)
    assert fsam(*command, "--steps", 5) == 0
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_00000005", *kept}
    assert fsam(*arguments(text, tmp_path / "b", "--branch-from", f"{out}@4", "--steps", 8)) == 2
    assert "holds no checkpoint of step 4; there are: 5" in capsys.readouterr().err


BAD_LINES = {"garbage": b"garbage\n", "no step": b"{}\n", "a number": b"3\n", "not UTF-8": b"\xff\xfe\n"}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_lines_of_the_metrics_cost_only_themselves(bad, text, tmp_path, capsys):
    out = tmp_path / "run"
    command = arguments(text, out, "--framework", "torch", "--method", "adamw", "--probe-steps", 0)
    assert fsam(*command, "--steps", 4) == 0
    first, *others = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(first + BAD_LINES[bad] + b"".join(others) + b'{"step": 5, "lo')
    assert fsam("runs", tmp_path) == 0
    assert "4 of 4" in capsys.readouterr().out
    assert fsam(*(x for x in command if x != "--quiet"), "--steps", 6) == 0
    assert f"metrics.jsonl: 1 of its {len(others) + 2} lines cannot be read" in capsys.readouterr().err.replace(
        "\n", ""
    )
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_a_file_is_hashed_once_and_again_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1)  # as if a file had been as it is for long
    digests, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: digests.append(1) or digest(*given))
    path = tmp_path / "state"
    path.write_bytes(b"one")
    assert files.checksum(path) == files.checksum(path) == hashlib.blake2b(b"one").hexdigest()
    assert len(digests) == 1
    path.write_bytes(b"other")
    assert files.checksum(path) == hashlib.blake2b(b"other").hexdigest()
