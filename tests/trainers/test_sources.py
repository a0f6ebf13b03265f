"""Runs that other runs are made from: named by step, moved, trained further, deleted."""

import json
import shutil

import numpy as np
import pytest
from small_runs import arguments, fsam

from fsam_core import UserError
from fsam_trainers import pretrained

TORCH = ("--framework", "torch", "--method", "adamw")


@pytest.fixture
def base(text, tmp_path):
    """A run with checkpoints of the steps 3, 4 and 6."""
    out = tmp_path / "base"
    more = ("--steps", 6, "--checkpoint-every", 3, "--keep", 9, "--learning-rate-schedule", "wsd")
    assert fsam(*arguments(text, out, *TORCH, *more)) == 0
    return out


def extended(base, text, *more) -> int:
    return fsam(*arguments(text, base, *TORCH, "--steps", 12, "--keep", 9, "--learning-rate-schedule", "wsd", *more))


def test_a_model_is_named_by_its_step_everywhere(base, text, tmp_path, capsys):
    early, late = (pretrained.find(f"{base}@{step}", "MODEL") for step in (3, 6))
    assert (early.steps, late.steps) == (3, 6)
    assert pretrained.find(str(base), "MODEL").fingerprint == late.fingerprint != early.fingerprint
    assert pretrained.find(str(base / "checkpoints" / "step_00000003"), "MODEL").fingerprint == early.fingerprint
    assert fsam("evaluate", f"{base}@3", f"{base}@6", "--sequences", 4, "--json", tmp_path / "rows.json") == 0
    first, last = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (first["model"], first["steps"], last["steps"]) == (f"{base}@3", 3, 6)
    assert first["loss"] != last["loss"]
    assert fsam("export", f"{base}@3", "--out", tmp_path / "model") == 0
    exported = pretrained.find(str(tmp_path / "model"), "MODEL").weights()
    assert all(np.array_equal(exported[name], value) for name, value in early.weights().items())
    out = tmp_path / "tuned"
    assert fsam(*arguments(text, out, *TORCH, "--steps", 1, "--init-from", f"{base}@3")) == 0
    capsys.readouterr()
    assert fsam("sample", f"{base}@5") == 2
    assert "holds no checkpoint of step 5; there are: 3, 4, 6" in capsys.readouterr().err


def test_a_run_is_not_resumed_from_other_weights_than_it_began_with(base, text, tmp_path, capsys):
    out = tmp_path / "tuned"
    one = arguments(text, out, *TORCH, "--steps", 2, "--init-from", base)
    assert fsam(*one) == 0
    assert fsam(*one) == 0  # it is finished
    assert extended(base, text) == 0
    capsys.readouterr()
    assert fsam(*one) == 2
    said = capsys.readouterr().err
    assert f"--init-from: {out} holds a run that began with the weights of {base} as it was then" in said
    assert said.count("\n") == 1
    assert fsam(*one, "--init-from", base / "ended-at-6") == 0  # where extending has put it
    assert fsam(*arguments(text, out, *TORCH, "--steps", 2)) == 2
    assert "and now they are drawn by --seed" in capsys.readouterr().err
    assert fsam(*one, "--fresh") == 0


def test_fine_tunings_of_a_model_that_went_on_are_not_taken(base, text, tmp_path, capsys):
    more = ("--rates", "1e-2", "--steps", 2, "--batch", 4, "--sequences", 4, "--quiet", "--out", tmp_path / "tuned")
    assert fsam("evaluate", base, "--fine-tune", text, *more) == 0
    assert extended(base, text) == 0
    capsys.readouterr()
    assert fsam("evaluate", base, "--fine-tune", text, *more) == 2
    assert "holds a run that began with the weights of" in capsys.readouterr().err


def test_losses_of_a_tuning_from_other_weights_are_not_taken(base, text, tmp_path, capsys):
    tune = arguments(text, tmp_path / "tune", *TORCH, "--steps", 4, "--init-from", base, command="tune")
    assert fsam(*tune, "--grid", "learning-rate=0.01,0.02") == 0
    assert extended(base, text) == 0
    capsys.readouterr()
    assert fsam(*tune, "--grid", "learning-rate=0.01,0.02") == 2
    assert "holds a run that began with the weights of" in capsys.readouterr().err


def test_a_branch_is_resumed_after_its_base_was_moved(base, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    branch = ("train", "--branch-from", "base@3", "--out", "branch", "--steps", 8, "--quiet")
    assert fsam(*branch) == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("base", "branch"):
        shutil.move(name, moved / name)
    monkeypatch.chdir(moved)
    assert fsam(*branch) == 0
    assert fsam(*branch, "--branch-from", "base@6") == 2
    assert "branch holds another run than the branch from base" in capsys.readouterr().err
    shutil.rmtree("base/checkpoints/step_00000003")  # as --keep does
    shutil.move("base", "elsewhere")
    assert fsam(*branch, "--branch-from", "elsewhere@3") == 2


def test_fresh_deletes_nothing_that_the_command_needs(base, text, tmp_path, capsys):
    kept = lambda: {path: path.read_bytes() for path in base.rglob("*") if path.is_file() and path.name != ".lock"}
    before, at = kept(), ("--steps", 9, "--fresh", "--quiet")
    for more, says in (
        (("--branch-from", f"{base}@6", "--out", base), "which --branch-from starts from; give another --out"),
        (("--init-from", f"{base}@6", "--out", base), "which --init-from starts from; give another --out"),
    ):
        assert fsam("train", "--config", base / "config.toml", *at, *more) == 2
        assert f"--fresh would delete {base}, {says}" in capsys.readouterr().err
    other = tmp_path / "other"
    assert fsam(*arguments(text, other, *TORCH, "--steps", 1)) == 0
    held = sorted(other.rglob("*"))
    assert fsam("train", "--branch-from", f"{base}@5", "--out", other, *at) == 2
    assert "holds no checkpoint of step 5; there are: 3, 4, 6" in capsys.readouterr().err
    assert sorted(other.rglob("*")) == held
    assert kept() == before


def test_a_tokenizer_beside_files_of_tokens_stays(base, tmp_path):
    tokens, out = tmp_path / "tokens", tmp_path / "run"
    tokens.mkdir()
    np.arange(2000, dtype="<u2").__mod__(300).tofile(tokens / "train.bin")
    one = arguments(tokens, out, *TORCH, "--steps", 1)
    assert fsam(*one) == 0
    shutil.copyfile(base / "tokenizer.json", out / "tokenizer.json")
    assert fsam(*one) == 0
    assert pretrained.find(str(out), "MODEL").tokenizer == out / "tokenizer.json"
    assert fsam(*one, "--fresh") == 0
    assert pretrained.find(str(out), "MODEL").tokenizer is None
    shutil.copyfile(base / "tokenizer.json", tokens / "tokenizer.json")
    assert fsam(*arguments(tokens, tokens, *TORCH, "--steps", 1, "--fresh")) == 0
    assert (tokens / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_what_another_process_is_writing_is_left_alone(base, text):
    writing = base / "checkpoints" / ".writing-step_00000099-999999"
    writing.mkdir()
    (base / "checkpoints" / ".writing-by-hand").mkdir()
    pretrained.find(str(base), "MODEL")
    assert writing.is_dir()
    assert extended(base, text) == 0  # which holds the folder's lock
    assert not writing.exists()


def test_a_checkpoint_that_its_run_deletes_is_one_sentence(base):
    found = pretrained.find(str(base), "MODEL")
    shutil.rmtree(base / "checkpoints" / "step_00000006")
    with pytest.raises(UserError, match="its run went on and deleted step_00000006 before that was read"):
        found.weights()
