"""`fsam tune`: halving, an edge that is extended, runs that are not repeated, the command that it prints."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
from small_runs import arguments, fsam, steps_done, train_options

from fsam_core import UserError
from fsam_trainers import loop, tuning
from fsam_trainers.config import Intervals, Settings
from fsam_trainers.console import Console
from fsam_trainers.models.layout import ModelConfig

MODEL = ModelConfig(layers=1, width=8, heads=2, seq_len=4, vocab_size=16)
SETTINGS = Settings("torch", "sam", MODEL, steps=16, batch=1)


def tuned(grid, loss, refused=lambda point: False):
    """`tuning.tune` with invented losses, and how many candidates were trained to each step."""
    counts = {4: 0, 8: 0, 16: 0}
    points = {}

    def candidate_of(point):
        if refused(dict(point)):
            raise UserError("no such run")
        points[Path(tuning.text(point))] = dict(point)
        return tuning.Candidate(SETTINGS, Path(tuning.text(point)))

    def loss_at(one, step):
        counts[step] += 1
        return loss(points[one.folder])

    return tuning.tune(grid, candidate_of, loss_at, Console(quiet=True)), counts


def test_half_of_the_candidates_goes_on_at_each_pause():
    grid = {"learning-rate": [1.0, 2.0, 4.0, 8.0], "rho": [0.1, 0.2, 0.4]}
    found, counts = tuned(grid, lambda x: abs(x["learning-rate"] - 2) + abs(x["rho"] - 0.2))
    assert found.values == {"learning-rate": 2.0, "rho": 0.2}
    assert counts == {4: 12, 8: 6, 16: 3}
    assert [len(one["losses"]) for one in found.tried].count(3) == 3


def test_axis_is_extended_until_the_best_is_inside():
    found, _ = tuned({"learning-rate": [1.0, 2.0, 4.0]}, lambda x: abs(math.log2(x["learning-rate"]) + 2))
    assert found.values == {"learning-rate": 0.25}
    assert {one["values"]["learning-rate"] for one in found.tried} == {4, 2, 1, 0.5, 0.25, 0.125}


def test_axis_ends_where_a_run_is_refused_or_has_too_many_values():
    found, _ = tuned({"dropout": [0.2, 0.4]}, lambda x: -x["dropout"], refused=lambda x: x["dropout"] > 1)
    assert found.values == {"dropout": pytest.approx(0.8)}
    found, _ = tuned({"rho": [1.0, 2.0]}, lambda x: -x["rho"])
    assert found.values == {"rho": 2.0 ** (tuning.MOST_VALUES - 1)}
    found, _ = tuned({"scope": ["all", "norms"], "rho": [0.0, 1.0]}, lambda x: x["rho"])  # no geometric axes
    assert len(found.tried) == 4


def test_tuning_where_all_diverge_says_so():
    with pytest.raises(UserError, match="every candidate has diverged"):
        tuned({"rho": [1.0, 2.0]}, lambda x: math.inf)


def test_diverged_candidate_is_the_worst_and_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "train", lambda *given, **more: {"status": "diverged"})  # and no evaluation
    loss_at = tuning.trainer(None, Intervals(), Console(quiet=True), {})
    assert loss_at(tuning.Candidate(SETTINGS, tmp_path), 4) == math.inf


def tune(text, out, *more):
    rates = ("--grid", "learning-rate=0.002,0.004,rho=0.1,0.2")
    return arguments(text, out, "--framework", "torch", "--method", "sam", "--steps", 8, *rates, *more, command="tune")


def test_tune_resumes_by_run_and_its_command_trains(text, tmp_path, capsys, monkeypatch):
    out, runs = tmp_path / "tune", []
    train = loop.train

    def counting(settings, corpus, out, *rest, until=None, **more):
        if len(runs) == 3:
            raise UserError("killed")
        runs.append((out.name, until))
        return train(settings, corpus, out, *rest, until=until, **more)

    monkeypatch.setattr(tuning, "train", counting)
    assert fsam(*tune(text, out)) == 2
    before = list(runs)
    monkeypatch.setattr(
        tuning, "train", lambda *given, **more: runs.append((given[2].name, more["until"])) or train(*given, **more)
    )
    assert fsam(*tune(text, out)) == 0
    assert len(runs) == len(set(runs))
    assert runs[:3] == before
    result = json.loads((out / "tuning.json").read_text())
    adamw, sam = result["rows"]
    assert (adamw["method"], sam["method"]) == ("adamw", "sam")
    assert adamw["values"].keys() == {"learning-rate"}
    # The best learning rate of so short a run is beyond the grid.
    assert float(sam["values"]["learning-rate"]) > 0.004
    assert sam["val_loss"] == min(loss for one in sam["tried"] for loss in one["losses"].values())
    assert steps_done(Path(sam["run"])) == 8
    shown = capsys.readouterr().out
    assert sam["train"] in shown
    # The printed command is the run that was found.
    _, *command = shlex.split(sam["train"])
    assert "--grid" not in command
    assert vars(train_options(command).settings()) == vars(
        train_options(["train", "--config", f"{sam['run']}/config.toml"]).settings()
    )
    # Again: nothing is trained.
    done = len(runs)
    assert fsam(*tune(text, out)) == 0
    assert len(runs) == done
    assert fsam(*tune(text, out, "--batch", 8)) == 2
    assert "other settings" in capsys.readouterr().err


def test_losses_of_another_learning_rate_are_not_taken(text, tmp_path, capsys):
    grid = ("--grid", "rho=0.1", "--method", "sam", "--steps", 2)
    assert fsam(*tune(text, tmp_path / "tune", *grid)) == 0
    capsys.readouterr()
    # AdamW's learning rates have other folders; that of ρ = 0.1 is the same.
    assert fsam(*tune(text, tmp_path / "tune", *grid, "--learning-rate", 0.02)) == 2
    assert "learning_rate 0.01 (now 0.02)" in capsys.readouterr().err


def test_a_shorter_run_is_printed_with_its_own_warm_up(text, tmp_path):
    out = tmp_path / "tune"
    assert fsam(*tune(text, out, "--grid", "rho=0.1", "--budget", "flops", "--warmup", 4)) == 0
    _, sam = json.loads((out / "tuning.json").read_text())["rows"]
    _, *command = shlex.split(sam["train"])
    settings = train_options(command).settings()
    assert (settings.steps, settings.warmup) == (4, 2)  # SAM's two passes: half of AdamW's 8 steps
    assert vars(settings) == vars(train_options(["train", "--config", f"{sam['run']}/config.toml"]).settings())


def test_a_printed_command_has_one_length(text, tmp_path):
    out = tmp_path / "tune"
    more = [x for x in tune(text, out, "--grid", "rho=0.1", "--budget", "flops") if x != "--steps"]
    more = [x for x in more if x != "8"]
    assert fsam(*more, "--tokens-per-param", 0.05) == 0
    for row in json.loads((out / "tuning.json").read_text())["rows"]:
        assert "--tokens-per-param" not in row["train"]
        assert train_options(shlex.split(row["train"])[1:]).settings().steps == row["steps"]


def test_time_budget_takes_steps_from_the_method_and_not_from_adamw(text, tmp_path):
    out = tmp_path / "tune"
    assert fsam(*tune(text, out, "--budget", "time", "--grid", "rho=0.1")) == 0
    adamw, sam = json.loads((out / "tuning.json").read_text())["rows"]
    ratio = json.loads((out / "costs.json").read_text())["costs"]["sam"][1]
    assert adamw["steps"] == 8
    assert sam["steps"] == max(1, round(8 / ratio))
    assert f"--steps {sam['steps']}" in sam["train"]
    assert len(adamw["tried"]) >= 3  # tuned by its learning rate, though the grid has none


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("rho", "'rho' is no option=value"),
        ("rhoo=1", "'rhoo=1' is no option=value"),
        ("rho=x", "--grid: rho=x"),
        ("rho=-1", "--rho"),
        ("every=1.5", "is no int"),
    ],
)
def test_wrong_grid_is_one_sentence(grid, said, text, tmp_path, capsys):
    assert fsam(*tune(text, tmp_path / "tune", "--grid", grid)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "tune").exists()
