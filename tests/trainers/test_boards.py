"""The metrics on TensorBoard and W&B are those of metrics.jsonl."""

from __future__ import annotations

import json
import time

import pytest
from small_runs import arguments, fsam, train_options

PACE = ("--framework", "torch", "--method", "sam", "--evaluate-every", 4, "--checkpoint-every", 4, "--probe-steps", 0)


def numbers(out):
    """(name, step) -> value of all finite numbers in metrics.jsonl but the seconds."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        found |= {
            (name, step): float(x) for name, x in values.items() if name != "seconds" and isinstance(x, int | float)
        }
    return found


def test_tensorboard_has_each_step_of_a_resumed_run_once(text, tmp_path):
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    out = tmp_path / "run"
    command = arguments(text, out, *PACE, "--schedule", "wsd", "--decay", 0, "--warmup", 0)
    assert fsam(*command, "--steps", 4) == 0  # the option is given later: what was before is there as well
    assert fsam(*command, "--steps", 6, "--log", "tensorboard") == 0
    assert fsam(*command, "--steps", 8, "--log", "tensorboard") == 0
    seen = []
    for path in (out / "tensorboard").iterdir():
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            seen += [((x.tag, event.step), x.tensor.float_val[0]) for x in event.summary.value]
    assert len(seen) == len(dict(seen))
    assert dict(seen) == pytest.approx(numbers(out), rel=1e-6)
    assert {"loss", "val_loss", "learning_rate", "rho", "skipped_steps", "grad_norm"} <= {name for (name, _), _ in seen}


def test_wandb_offline_has_the_metrics(text, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    command = arguments(text, out, *PACE, "--steps", 4, "--log", "wandb")
    assert fsam(*command) == 0
    (record,) = (out / "wandb").glob("offline-run-*/*.wandb")
    kept = (out / "wandb.id").read_text()
    expected = [x.encode() for x in (kept, "val_loss", "grad_norm", "skipped_steps")]
    until = time.monotonic() + 20  # W&B's own process may write after the run is over
    while not all(x in record.read_bytes() for x in expected) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(x in record.read_bytes() for x in expected)
    assert fsam(*command) == 0
    assert (out / "wandb.id").read_text() == kept


@pytest.mark.parametrize("board", ["tensorboard", "wandb"])
def test_missing_board_is_one_sentence(board, text, tmp_path, capsys, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == board else find(name, *rest))
    assert fsam(*arguments(text, tmp_path / "run", *PACE, "--steps", 4, "--log", board)) == 2
    assert f"{board} is not installed: pip install 'fsam[{board}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_board_is_named(text, tmp_path, capsys):
    assert fsam(*arguments(text, tmp_path / "run", *PACE, "--steps", 4, "--log", "mlflow")) == 2
    assert "--log must be jsonl, tensorboard, wandb, got 'mlflow'" in capsys.readouterr().err
    assert train_options(arguments(text, tmp_path, "--log", "wandb")).intervals_of(5).log == "wandb"
