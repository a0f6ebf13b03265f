"""The `fsam` command as a person uses it: what it writes, what it prints, what it refuses."""

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import spawn
from small_runs import arguments, fsam, train_options

from fsam_core import NAMES
from fsam_trainers import registry

FIGURES = {
    "method", "framework", "backend", "params", "steps", "tokens", "seconds", "step_ms_median", "checkpoint_ms",
    "train_loss", "val_loss", "skipped_steps", "cost_ratio", "settings", "data", "command", "status",
}  # fmt: skip


# Seconds a case in JAX; there the step itself is tested with every method.
QUICK_IN_JAX = ("adamw", "precond-functional-sam")
METHODS = [
    pytest.param(name, framework, marks=pytest.mark.slow if framework == "jax" and name not in QUICK_IN_JAX else ())
    for name in NAMES
    for framework in ("jax", "torch")
]


@pytest.mark.parametrize(("method", "framework"), METHODS)
def test_every_method_trains_in_both_frameworks(method, framework, text, tmp_path):
    out = tmp_path / "out.json"
    more = ("--framework", framework, "--method", method, "--steps", 12, "--evaluate-every", 0, "--probe-steps", 0)
    assert fsam(*arguments(text, tmp_path / "run", *more, "--json", out)) == 0
    figures = json.loads(out.read_text())
    assert figures.keys() >= FIGURES
    assert (figures["method"], figures["framework"], figures["steps"]) == (method, framework, 12)
    assert figures["tokens"] == 12 * 4 * 16
    assert figures["skipped_steps"] == 0
    assert figures["val_loss"] < np.log(300) - 0.05
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 13))
    expected = 0 if method == "adamw" else 0.2
    assert all(x["perturbation_norm"] == pytest.approx(expected, rel=1e-5) for x in steps)


def test_both_frameworks_train_to_the_same_losses(text, tmp_path):
    losses = {}
    for framework in ("jax", "torch"):
        out = tmp_path / framework
        more = ("--framework", framework, "--steps", 15, "--micro-batches", 2, "--weight-decay", 0.1, "--no-tied")
        assert fsam(*arguments(text, out, *more, "--evaluate-every", 5, "--probe-steps", 0)) == 0
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
        losses[framework] = [x.get("loss", x.get("val_loss")) for x in lines]
    np.testing.assert_allclose(losses["jax"], losses["torch"], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ascent", ["full", "part"])
def test_a_correction_fraction_is_equal_in_both_frameworks(ascent, text, tmp_path):
    losses = {}
    for framework in ("jax", "torch"):
        out = tmp_path / framework
        more = ("--framework", framework, "--steps", 8, "--evaluate-every", 0, "--probe-steps", 0, "--ascent", ascent)
        assert fsam(*arguments(text, out, *more, "--correction-fraction", "1/4")) == 0
        losses[framework] = [json.loads(x).get("loss") for x in (out / "metrics.jsonl").read_text().splitlines()][:-1]
    np.testing.assert_allclose(losses["jax"], losses["torch"], rtol=2e-4)


HEADS = {
    "losses": ("--label-smoothing", 0.1, "--z-loss", 1e-3, "--soft-cap", 20),
    "keep": ("--cotangent", "keep", "--micro-batches", 2),
    "recompute": ("--cotangent", "recompute", "--micro-batches", 2),
    "cut hidden": ("--cut", "hidden"),
}


@functools.cache
def head_losses(name, framework):
    """Training losses of a few steps with one of HEADS or without, and the one that is reported at the end."""
    draw = np.random.default_rng(0)
    batches = [draw.integers(0, 300, (4, 17), dtype=np.int32) for _ in range(5)]
    more = ("--framework", framework, "--steps", 5, "--rho", 0.5, *HEADS.get(name, ()))
    model = registry.make(train_options(arguments("", "", *more)).settings())
    return np.array(
        [*(model.step(tokens, i)().loss for i, tokens in enumerate(batches)), model.evaluate(batches[:1]).loss]
    )


@pytest.mark.parametrize("name", HEADS)
def test_head_options_are_equal_in_both_frameworks(name):
    np.testing.assert_allclose(head_losses(name, "jax"), head_losses(name, "torch"), rtol=3e-4)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_head_options_change_the_loss_as_documented(framework):
    plain = head_losses("plain", framework)
    of = {name: head_losses(name, framework) for name in HEADS}
    np.testing.assert_allclose(of["keep"], plain, rtol=1e-5)
    np.testing.assert_allclose(of["recompute"], plain, rtol=1e-5)
    assert np.abs(of["cut hidden"] - plain).max() > 1e-4
    np.testing.assert_allclose(of["cut hidden"][0], plain[0], rtol=1e-6)  # the loss is that of the unperturbed weights
    # Smoothing and the z-loss are in the loss that is trained and not in the one that is reported at the end.
    assert of["losses"][0] > plain[0] + 0.02
    assert abs(of["losses"][-1] - plain[-1]) < 0.02


def test_tokens_per_param_sets_the_steps(text, tmp_path):
    out = tmp_path / "out.json"
    more = ("--framework", "torch", "--method", "adamw", "--tokens-per-param", 0.0003, "--json", out)
    assert fsam(*arguments(text, tmp_path / "run", *more)) == 0
    figures = json.loads(out.read_text())
    assert figures["steps"] == int(np.ceil(0.0003 * figures["non_embedding_params"] / (4 * 16)))


def test_the_cost_ratio_is_measured_against_a_base_step(text, tmp_path):
    out = tmp_path / "out.json"
    assert fsam(*arguments(text, tmp_path / "run", "--framework", "torch", "--steps", 8, "--json", out)) == 0
    figures = json.loads(out.read_text())
    assert figures["cost_ratio"] == pytest.approx(figures["step_ms_median"] / figures["base_step_ms"])


@pytest.mark.parametrize("budget", ["steps", *(pytest.param(x, marks=pytest.mark.slow) for x in ("time", "flops"))])
def test_compare_writes_table_plot_and_self_contained_page(budget, text, tmp_path, capsys):
    out = tmp_path / "compare"
    more = ("--framework", "torch", "--steps", 12, "--seeds", 2, "--budget", budget, "--json", tmp_path / "c.json")
    command = arguments(text, out, *more, command="compare")
    assert fsam(*command) == 0
    printed = capsys.readouterr().out
    for name in ("plot.png", "report.html", "comparison.json"):
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 0
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison == json.loads((tmp_path / "c.json").read_text())
    adamw, ours = comparison["rows"]
    assert [adamw["method"], ours["method"]] == ["adamw", "precond-functional-sam"]
    assert len(ours["val_losses"]) == 2
    assert len(set(ours["val_losses"])) == 2
    assert adamw["cost"]["ratio"] == 1
    if budget == "flops":
        assert 6 <= ours["steps"] < 9  # about two AdamW steps each
    else:
        assert ours["steps"] == (12 if budget == "steps" else max(1, round(12 / ours["cost"]["ratio"])))
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#)', page)
    assert page.count("<svg") == 3  # loss against time and steps, norm of the gradient
    assert "continued, before training:" in page
    assert "±" in page
    # Again: nothing is trained a second time, and the measured cost is kept.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("files.json")}
    assert fsam(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("files.json")} == before
    assert json.loads((out / "comparison.json").read_text())["rows"] == comparison["rows"]


def test_backends_says_what_auto_picks(tmp_path, capsys):
    out = tmp_path / "backends.json"
    assert fsam("backends", "--json", out) == 0
    picked = {row["framework"]: row["backend"] for row in json.loads(out.read_text()) if row["picked"]}
    assert picked == {"jax": "xla", "torch": "torch"}
    assert "auto" in capsys.readouterr().out


BAD = {
    "an unknown method": (["--method", "sma"], ["--method", "'sma'", "functional-sam"]),
    "an unknown preset": (["--preset", "small"], ["--preset", "'small'", "tiny"]),
    "an unknown framework": (["--framework", "tf"], ["--framework", "'tf'", "jax or torch"]),
    "a negative rho": (["--rho", "-0.1"], ["--rho", "-0.1", ">= 0"]),
    "rho that is no number": (["--rho", "nan"], ["--rho", "nan"]),
    "an unknown norm": (["--norm", "l1"], ["norm", "'l1'", "dual"]),
    "a missing file": (["--data", "no/such/file.txt"], ["--data", "no/such/file.txt"]),
    "no steps": (["--steps", "0"], ["--steps", "at least 1", "0"]),
    "two budgets": (["--tokens-per-param", "20"], ["--steps", "--tokens-per-param"]),
    "a batch that does not divide": (["--micro-batches", "3"], ["--micro-batches", "divides --batch 4", "3"]),
    "sequences longer than the text": (["--seq-len", "99999"], ["--data", "sequence"]),
    "a vocabulary too small for bytes": (["--vocab-size", "100"], ["--vocab-size", "100", "257"]),
    "a fraction that is no number": (["--correction-fraction", "1/0"], ["--correction-fraction", "'1/0'"]),
    "an unknown form of the cotangent": (["--cotangent", "both"], ["--cotangent", "'both'", "keep or recompute"]),
    "a cut that is none": (["--cut", "embedding"], ["cut", "'embedding'", "logits, hidden"]),
    "the hidden cut of plain SAM": (["--cut", "hidden", "--method", "sam"], ["cut", "functional method", "'sam'"]),
    "label smoothing of one": (["--label-smoothing", "1"], ["--label-smoothing", "[0, 1)"]),
    "a fraction above one": (["--correction-fraction", "2"], ["--correction-fraction", "2"]),
    "a fraction that does not cut the batch": (
        ["--correction-fraction", "1/8"],
        ["--correction-fraction", "--batch 4"],
    ),
    "an unknown ascent": (["--ascent", "half"], ["ascent", "'half'", "part"]),
    "an unknown backend": (["--backend", "cuda"], ["'cuda'", "xla"]),
    "the other framework's backend": (["--framework", "jax", "--backend", "torch"], ["'torch'", "xla"]),
    "dropout of one": (["--dropout", "1"], ["--dropout", "1"]),
    "a missing tokenizer": (["--tokenizer", "none.json"], ["--tokenizer", "none.json"]),
    "a learning rate of zero": (["--learning-rate", "0"], ["--learning-rate", "0"]),
    "evaluation of nothing": (["--evaluation-batches", "0"], ["--evaluation-batches", "0"]),
    "a folder for --json": (["--json", "."], ["--json", "folder"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(what, text, tmp_path, capsys):
    more, said = BAD[what]
    out = tmp_path / "run"
    assert fsam(*arguments(text, out, "--steps", 3, *more)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("fsam: error: ")
    for part in said:
        assert part in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "adamw,sma"], ["--methods", "sma"]),
        (["--methods", ""], ["--methods", "none given"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--cost-steps", "3"], ["--cost-steps", "3"]),
    ],
)
def test_bad_input_to_compare(more, said, text, tmp_path, capsys):
    assert fsam(*arguments(text, tmp_path / "c", *more, command="compare")) == 2
    errors = capsys.readouterr().err
    assert all(part in errors for part in said)
    assert not (tmp_path / "c").exists()


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert fsam(*arguments(tmp_path / "empty.txt", tmp_path / "run")) == 2
    assert "--data" in capsys.readouterr().err


def test_usage_errors_exit_with_2_and_help_with_0(capsys):
    assert fsam("train", "--steps", "many") == 2
    assert fsam("fly") == 2
    assert fsam("train", "--help") == 0
    assert "--method" in capsys.readouterr().out


def test_help_shows_the_defaults_of_preset_and_savings(capsys):
    assert fsam("compare", "--preset", "24m", "--savings", "cheap", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option, default in (("batch", 256), ("width", 576), ("correction-fraction", 0.125), ("cut", "hidden")):
        assert re.search(rf"--{option} \S+ [^(]*(\([^d][^)]*\)[^(]*)*\(default: {default}\)", shown), option
    for replaced in ("--method ", "--seed ", "--probe-steps "):
        assert replaced not in shown


def test_compare_names_a_run_that_diverged(text, tmp_path, capsys):
    more = ("--framework", "torch", "--methods", "adamw,sam:rho=1e30", "--steps", 4, "--cost-steps", 10)
    assert fsam(*arguments(text, tmp_path / "c", *more, command="compare")) == 1
    assert "fsam: error: 1 of the runs diverged: " in (said := capsys.readouterr().err)
    assert "sam_rho1e30-seed0" in said


def test_prompts_and_answers_are_compared_and_the_next_commands_keep_the_methods_options(tmp_path):
    data, out = tmp_path / "a.jsonl", tmp_path / "c"
    rows = [{"prompt": f"What is {n} times {n}?", "answer": str(n * n)} for n in range(300)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = "sam:rho=0.1:correction-fraction=1/2"
    more = ("--framework", "torch", "--methods", f"adamw,{ours}", "--steps", 2, "--cost-steps", 10)
    assert fsam(*arguments(data, out, *more, command="compare")) == 0
    assert "What is" in (out / "report.html").read_text()
    following = dict(json.loads((out / "comparison.json").read_text())["next"])
    tune = following["the best learning rate and ρ, AdamW's too"]
    assert tune.startswith("fsam tune --method sam ")
    assert tune.endswith(" --correction-fraction 1/2")


@pytest.mark.parametrize("command", ["compare", "tune", "evaluate"])
def test_a_command_of_several_runs_exits_with_its_signal(command, text, tmp_path, monkeypatch, capsys):
    run, out, torch = tmp_path / "run", tmp_path / "out", ("--framework", "torch")
    assert fsam(*arguments(text, run, *torch, "--method", "adamw", "--steps", 1)) == 0
    name, given = {
        "compare": ("compare", arguments(text, out, *torch, "--methods", "adamw", "--cost-steps", 10, command=command)),
        "tune": ("tuning", arguments(text, out, *torch, "--method", "adamw", command=command)),
        "evaluate": ("fine_tuning", [command, run, "--fine-tune", text, "--out", out, "--sequences", 4]),
    }[command]
    stopped = lambda *given, **more: {"status": "stopped", "signal": signal.SIGTERM}
    monkeypatch.setattr(importlib.import_module(f"fsam_trainers.{name}"), "train", stopped)
    capsys.readouterr()
    assert fsam(*given) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("stopped; the same command resumes from there\n")


def test_compare_shows_the_others_where_a_run_has_no_finite_loss(text, tmp_path, capsys):
    out = tmp_path / "c"
    more = ("--framework", "torch", "--methods", "adamw:learning-rate=1e30,adamw", "--steps", 4, "--cost-steps", 10)
    more = (*more, "--seeds", 2)
    for _ in range(2):  # trained, then read from the folder
        assert fsam(*arguments(text, out, *more, command="compare")) == 1
        assert "2 of the runs diverged" in capsys.readouterr().err
        comparison = json.loads((out / "comparison.json").read_text())
        lost, kept = comparison["rows"]
        assert (lost["val_losses"], lost["best_val_loss_mean"]) == ([None, None], None)
        assert lost["val_loss_spread"] is None
        assert kept["val_loss_spread"] > 0
        assert kept["val_loss_mean"] < 7
        sample = next(command for what, command in comparison["next"] if "best model" in what)
        assert sample == f"fsam sample {out / 'adamw-seed0'}"
    assert fsam("sample", out / "adamw_learning-rate1e30-seed0") == 2
    assert "its logits are not finite" in capsys.readouterr().err


def test_a_run_that_skips_fifty_steps_in_a_row_ends_and_the_others_are_compared(text, tmp_path, capsys):
    out = tmp_path / "c"
    more = ("--framework", "torch", "--methods", "adamw,adamw:learning-rate=1e30", "--cost-steps", 10)
    more = (*more, "--checkpoint-every", 1000)  # the lost one has none
    assert fsam(*arguments(text, out, *more, "--steps", 90, command="compare")) == 1
    assert "1 of the runs diverged" in capsys.readouterr().err
    kept, lost = json.loads((out / "comparison.json").read_text())["rows"]
    assert kept["val_loss_mean"] < 7
    assert lost["val_losses"] == [None]
    run = ("--framework", "torch", "--method", "adamw", "--learning-rate", "1e30", "--json", tmp_path / "f.json")
    assert fsam(*arguments(text, tmp_path / "run", *run, "--steps", 90)) == 1
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["status"], figures["val_loss"]) == ("diverged", None)
    assert figures["steps"] < 60


# --- where results go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        ("> /dev/full", 2, "fsam: error: no space left for what is printed; files are written whole or not at all\n"),
        ("| true", 128 + signal.SIGPIPE, ""),
    ],
)
def test_output_that_cannot_be_written_is_said_once(to, code, said):
    command = f"sleep 0.5 | {sys.executable} -m fsam_trainers.cli backends {to}; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], env=spawn.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_signs_that_a_terminal_does_not_have_are_replaced():
    done = spawn.run("-m", "fsam_trainers.cli", "train", "--help", env={"PYTHONIOENCODING": "ascii"})
    assert "--rho" in done.stdout


def test_names_that_are_not_utf8_are_refused(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).write_text("the quick brown fox\n" * 100)
    more = ("--framework", "torch", "--steps", 2)
    assert fsam(*arguments(folder, tmp_path / "run", *more)) == 2
    assert "texts/caf\\xe9.txt' is not UTF-8; rename it" in capsys.readouterr().err
    assert fsam(*arguments(folder / name, tmp_path / "run", *more)) == 2
    assert "is not UTF-8; rename the file" in capsys.readouterr().err
