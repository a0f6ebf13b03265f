"""What the command says to arguments that it cannot take, and its help."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from small_runs import fsam

from fsam_core import UserError
from fsam_trainers.cli import COMMANDS
from fsam_trainers.cli.compare import Compare
from fsam_trainers.cli.cost_options import CostOptions, settings_of
from fsam_trainers.cli.options import parse
from fsam_trainers.cli.parsing import did_you_mean, parsed
from fsam_trainers.cli.train import Train
from fsam_trainers.cli.tune import Tune

OPTIONS = ("learning-rate", "weight-decay", "steps", "tokens-per-param", "batch", "micro-batches", "seed")


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-3
    """of the optimizer"""
    quiet: bool = False


@dataclass(frozen=True)
class Example:
    """Do something.

    Examples:
        fsam example --steps 3
    """

    inner: tyro.conf.OmitArgPrefixes[Inner] = field(default_factory=Inner)
    steps: int = 300
    """optimizer steps"""
    log: Literal["jsonl", "wandb"] = "jsonl"
    out: Path | None = None
    batch: int | None = None


@dataclass(frozen=True)
class WithPlace:
    """Do it to something."""

    model: Annotated[str, tyro.conf.Positional]
    steps: int = 300


def read(command, text: str):
    return parsed(command, shlex.split(text), "fsam example")


def test_good_arguments_are_read():
    found = read(Example, "--steps=3 --learning-rate 0.1 --out a --quiet --log wandb")
    assert (found.steps, found.inner, found.out, found.log) == (3, Inner(0.1, True), Path("a"), "wandb")
    assert read(WithPlace, "m --steps 4") == WithPlace("m", 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--steps ten", "--steps must be a whole number, got 'ten'"),
        ("--batch 2.5", "--batch must be a whole number, got '2.5'"),
        ("--learning-rate=fast", "--learning-rate must be a number, got 'fast'"),
        ("--log paper", "--log must be one of jsonl, wandb, got 'paper'"),
        ("--steps", "--steps needs a whole number"),
        ("--steps --quiet", "--steps needs a whole number"),
        ("--quiet=yes", "--quiet takes no value, got 'yes'; --no-quiet is its opposite"),
        ("--lr 3", "--lr is no option of fsam example; did you mean --learning-rate?"),
        ("--stesp 3", "--stesp is no option of fsam example; did you mean --steps?"),
        ("--nothing-like-it", "--nothing-like-it is no option of fsam example; fsam example --help lists them"),
        ("word", "'word' is no option of fsam example; options begin with --, and fsam example --help lists them"),
    ],
)
def test_bad_arguments_are_one_sentence(text, said):
    with pytest.raises(UserError) as error:
        read(Example, text)
    assert str(error.value) == said


def test_a_missing_place_is_named():
    with pytest.raises(UserError, match="MODEL is missing; fsam example --help says what to give"):
        read(WithPlace, "--steps 3")


def test_a_path_that_looks_like_an_option_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash").mkdir()
    with pytest.raises(UserError, match=r"'-dash' looks like an option; give a path that begins otherwise: \./-dash"):
        read(WithPlace, "-dash")
    with pytest.raises(UserError, match="'-none' is no option of fsam example"):
        read(WithPlace, "-none")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "learning-rate"),
        ("wd", "weight-decay"),
        ("batch-size", "batch"),
        ("max-steps", "steps"),
        ("learning_rate", "learning-rate"),
        ("sed", "seed"),
        ("zzz", None),
    ],
)
def test_near_misses(given, meant):
    assert did_you_mean(given, OPTIONS) == meant


def test_help_has_defaults_choices_and_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        read(Example, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("Do something.", "examples:\n  fsam example --steps 3", "(default: 300)", "{jsonl,wandb}"):
        assert part in shown
    assert "None" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert fsam(name, "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert ("examples:" in shown) == (name != "profile")


@pytest.mark.parametrize("command", [Train, Compare, Tune, CostOptions])
def test_examples_of_the_help_are_read(command):
    prog = "fsam " + command.__name__.removesuffix("Options").lower()
    lines = re.findall(rf"^ +{prog}(.*)$", command.__doc__, re.MULTILINE)
    assert lines
    for line in lines:
        arguments = [word for word in shlex.split(line) if not word.endswith(".toml") and word != "--config"]
        if command is CostOptions:
            settings_of(parsed(command, arguments, prog))
        else:
            parse(command, arguments, prog).settings()


def test_command_names_versions_and_near_misses(capsys):
    assert fsam("--version") == 0
    assert re.match(r"fsam \d+\.\d+\.\d+, python 3\.", capsys.readouterr().out)
    assert fsam("trian") == 2
    assert capsys.readouterr().err == "fsam: error: 'trian' is no command; did you mean fsam train?\n"
    assert fsam("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80
    assert fsam("profile", "stepp") == 2
    assert "did you mean fsam profile step?" in capsys.readouterr().err
