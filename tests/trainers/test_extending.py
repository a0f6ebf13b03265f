"""A run's end is moved, its options are read from a file, a checkpoint is branched from, a run is begun again."""

from __future__ import annotations

import json
import math
import tomllib

import numpy as np
import pytest
from small_runs import arguments, assert_same_weights, final_weights, fsam, steps_done, train_options, valid_steps

from fsam_trainers.engine import Evaluation
from fsam_trainers.jax.engine import JaxEngine
from fsam_trainers.torch.engine import TorchEngine

FRAMEWORKS = (pytest.param("jax", marks=pytest.mark.slow), "torch")  # seconds each in JAX
PACE = ("--checkpoint-every", 4, "--evaluate-every", 0, "--probe-steps", 0)
ENDS = ("ended-at-8", "ended-at-8-2")
WSD = ("--schedule", "wsd", "--decay", 0.25, "--warmup", 2, "--dropout", 0.1)


def command(text, out, framework, *more, method="precond-functional-sam"):
    return arguments(text, out, "--framework", framework, "--method", method, *PACE, *more)


def lines(out):
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("seconds", "step_ms")} for x in found]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_extended_wsd_run_ends_as_one_run(framework, text, tmp_path, capsys):
    """The run of 16 resumes from step 12, where its decay began, and not from its end, which is set aside."""
    whole, out = (command(text, tmp_path / name, framework, *WSD) for name in ("whole", "run"))
    assert fsam(*whole, "--steps", 24) == 0
    assert fsam(*out, "--steps", 16, "--keep", 1, "--checkpoint-every", 0) == 0
    assert valid_steps(tmp_path / "run") == [12, 16]
    ended = final_weights([*out, "--steps", "16"])
    assert fsam(*(x for x in out if x != "--quiet"), "--steps", 24) == 0
    assert "from step 12, to the bit as one run: steps 16 (now 24)" in capsys.readouterr().err
    assert_same_weights(final_weights([*out, "--steps", "24"]), final_weights([*whole, "--steps", "24"]))
    steps = [x for x in lines(tmp_path / "run") if "loss" in x]
    assert steps == [x for x in lines(tmp_path / "whole") if "loss" in x]
    aside = tmp_path / "run" / "ended-at-16"
    assert_same_weights(final_weights(command(text, aside, framework, *WSD, "--steps", 16)), ended)
    assert steps_done(aside) == 16
    assert fsam("sample", aside, "--prompt", "a", "--tokens", 2) == 0


def test_a_second_end_of_the_same_length_has_a_folder_of_its_own(text, tmp_path):
    command = arguments(text, tmp_path / "run", "--framework", "torch", "--method", "adamw", "--probe-steps", 0, *WSD)
    for more in (("--steps", 8), ("--steps", 8, "--decay-shape", "1-sqrt"), ("--steps", 10, "--decay-shape", "1-sqrt")):
        assert fsam(*command, *more, "--keep", 3, "--checkpoint-every", 2) == 0
    first, second = (tomllib.loads((tmp_path / "run" / name / "config.toml").read_text()) for name in ENDS)
    assert (first["decay-shape"], second["decay-shape"]) == ("linear", "1-sqrt")


def test_warm_up_is_that_of_a_run_that_has_a_checkpoint(text, tmp_path):
    """A run that was stopped before its first checkpoint leaves a config.toml; a damaged one says nothing either."""
    out = tmp_path / "run"
    out.mkdir()
    command = arguments(text, out, "--framework", "torch", "--method", "adamw", "--probe-steps", 0)
    for left in ("warmup = 300\n", "", "warm"):
        (out / "config.toml").write_text(left)
        assert fsam(*command, "--steps", 10) == 0
        assert tomllib.loads((out / "config.toml").read_text())["warmup"] == 1


def test_extended_cosine_run_says_what_changes(text, tmp_path, capsys):
    out = tmp_path / "run"
    loud = [x for x in command(text, out, "torch") if x != "--quiet"]
    assert fsam(*loud, "--steps", 30, "--checkpoint-every", 0) == 0
    assert fsam(*loud, "--steps", 40) == 0  # without --warmup: the first run's own, though a tenth of 40 is another
    said = capsys.readouterr().err
    assert f"extending {out} from step 30" in said
    assert "at the learning rate 0.001 now, which becomes 0.00" in said
    assert steps_done(out) == 40
    assert tomllib.loads((out / "config.toml").read_text())["warmup"] == 3


def test_shorter_run_is_refused_and_nothing_is_touched(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert fsam(*command(text, out, "torch", "--steps", 8)) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert fsam(*command(text, out, "torch", "--steps", 6, "--warmup", 0)) == 2
    assert "none of its checkpoints is a beginning of this one" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_fresh_deletes_the_run_and_starts_again(text, tmp_path):
    out = tmp_path / "run"
    one = command(text, out, "torch", "--steps", 8)
    assert fsam(*one) == 0
    (out / "notes.txt").write_text("mine")
    assert fsam(*one, "--learning-rate", 0.02) == 2
    assert fsam(*one, "--learning-rate", 0.02, "--fresh", "--steps", 4) == 0
    assert steps_done(out) == 4
    assert valid_steps(out) == [4]
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_branch_with_the_same_options_is_the_base_run(framework, text, tmp_path):
    base, out = command(text, tmp_path / "base", framework, *WSD, "--steps", 12), tmp_path / "branch"
    assert fsam(*base, "--keep", 9) == 0
    branch = ["train", "--branch-from", f"{tmp_path / 'base'}@8", "--out", str(out), "--quiet"]
    assert fsam(*branch) == 0
    assert_same_weights(final_weights(branch), final_weights(base))
    assert lines(out) == lines(tmp_path / "base")[-len(lines(out)) :]
    assert [x["step"] for x in lines(out) if "loss" in x] == [9, 10, 11, 12]
    assert fsam(*branch) == 0  # again: it is finished
    assert_same_weights(final_weights(branch), final_weights(base))


def test_branch_resumes_the_stream_of_its_base(text, tmp_path):
    stream = ("--stream", "yes", "--data-workers", 0, "--shuffle-buffer", 8)
    base, out = command(text, tmp_path / "base", "torch", *WSD, *stream, "--steps", 12), tmp_path / "branch"
    assert fsam(*base, "--keep", 9) == 0
    assert fsam("train", "--branch-from", f"{tmp_path / 'base'}@8", "--out", out, "--quiet") == 0
    assert lines(out) == lines(tmp_path / "base")[-len(lines(out)) :]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_branch_takes_another_method_and_an_average(framework, text, tmp_path):
    """From AdamW to a method that remembers the last gradient, with an average of the weights; then back."""
    base = command(text, tmp_path / "base", framework, *WSD, "--steps", 12, method="adamw")
    assert fsam(*base, "--keep", 9) == 0
    out, back = tmp_path / "branch", tmp_path / "back"
    branch = ["train", "--branch-from", f"{tmp_path / 'base'}@8", "--out", str(out), "--quiet"]
    branch += ["--method", "sam", "--rho", "0.1", "--ascent", "previous", "--ema", "0.5", "--keep", "9"]
    assert fsam(*branch) == 0
    (first, *_, last, end) = lines(out)
    assert first["step"] == 9
    assert first["learning_rate"] == lines(tmp_path / "base")[8]["learning_rate"]
    assert last["perturbation_norm"] == pytest.approx(0.1, rel=1e-5)
    assert end["val_loss"] != end["val_loss_without_ema"]
    more = ["--method", "adamw", "--ascent", "full", "--ema", "0", "--steps", "14"]
    assert fsam("train", "--branch-from", f"{out}@12", "--out", str(back), "--quiet", *more) == 0
    assert steps_done(back) == 14


def test_comparison_of_branches_starts_all_at_the_base(text, tmp_path, capsys):
    base = command(text, tmp_path / "base", "torch", *WSD, "--steps", 12, "--seed", 3, method="adamw")
    assert fsam(*base, "--keep", 9) == 0
    compare = ("compare", "--branch-from", f"{tmp_path / 'base'}@8", "--out", tmp_path / "compare", "--quiet")
    assert fsam(*compare, "--methods", "adamw,sam:rho=0.1", "--seeds", 2) == 2
    assert "--branch-from takes --seeds 1" in capsys.readouterr().err
    assert fsam(*compare, "--methods", "adamw,sam:rho=0.1") == 0
    adamw, sam = json.loads((tmp_path / "compare" / "comparison.json").read_text())["rows"]
    assert adamw["val_loss_mean"] == lines(tmp_path / "base")[-1]["val_loss"]
    assert sam["val_loss_mean"] != adamw["val_loss_mean"]
    assert [x["step"] for x in lines(tmp_path / "compare" / "sam_rho0.1-seed3") if "loss" in x] == [9, 10, 11, 12]
    # A branch has one seed and equal steps, and is not tuned.
    following = json.loads((tmp_path / "compare" / "comparison.json").read_text())["next"]
    assert [command.split()[:2] for _, command in following] == [["fsam", "sample"], ["fsam", "sharpness"]]


def test_branch_that_does_not_fit_is_refused(text, tmp_path, capsys):
    base = command(text, tmp_path / "base", "torch", "--steps", 8, method="adamw")
    assert fsam(*base) == 0
    branch = lambda at, *more: ("train", "--branch-from", at, "--out", tmp_path / "branch", "--quiet", *more)
    for at, more, said in (
        ("base", (), "must be RUN@STEP"),
        ("nowhere@4", (), "give the folder of a run"),
        (f"{tmp_path / 'base'}@5", (), "holds no checkpoint of step 5; there are: 4, 8"),
        (f"{tmp_path / 'base'}@8", (), "--steps must be more than the 8"),
        (f"{tmp_path / 'base'}@4", ("--seed", 1), "seed 0 (now 1)"),
        (f"{tmp_path / 'base'}@4", ("--init-from", tmp_path / "base"), "--init-from: got "),
        (f"{tmp_path / 'base'}@4", ("--width", 8), "model.width 16 (now 8)"),
        (f"{tmp_path / 'base'}@4", ("--framework", "jax"), "framework 'torch' (now 'jax')"),
    ):
        assert fsam(*branch(at, *more)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert not (tmp_path / "branch" / "checkpoints").exists()


def test_written_config_gives_the_same_run(text, tmp_path):
    out = tmp_path / "run"
    one = command(text, out, "torch", "--steps", 6, "--correction-fraction", "1/4", "--no-tied", "--ema", 0.5)
    assert fsam(*one) == 0
    again = ["train", "--config", str(out / "config.toml"), "--out", str(tmp_path / "again"), "--quiet"]
    assert train_options(again).settings() == train_options(one).settings()
    assert vars(train_options(again).corpus) == vars(train_options(one).corpus)
    assert fsam(*again) == 0
    assert_same_weights(final_weights(again), final_weights(one))
    assert (out / "config.toml").read_text() == (tmp_path / "again" / "config.toml").read_text()
    assert train_options([*again, "--rho", "0.3"]).settings().rho == 0.3


def test_command_line_overrides_what_its_options_stand_for(text, tmp_path):
    """--savings stands for options that the file has, with other values; so does --preset."""
    (tmp_path / "c.toml").write_text('correction-fraction = 1.0\ncut = "logits"\nsteps = 9\nbatch = 16\nseq-len = 32\n')
    given = lambda *more: train_options(["train", "--config", str(tmp_path / "c.toml"), *more]).settings()
    assert (given().correction_fraction, given().cut, given().steps) == (1.0, "logits", 9)
    cheap = given("--savings", "cheap")
    assert (cheap.correction_fraction, cheap.cut, cheap.batch) == (1 / 8, "hidden", 16)
    assert given("--preset", "2m").model.seq_len != 32
    assert given("--tokens-per-param", "1").steps != 9
    assert given("--schedule=wsd").learning_rate_schedule == "wsd"


def test_a_preset_overrides_the_patch_of_a_file_that_windows_has_saved(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('task = "images"\npreset = "vit-tiny"\npatch = 2\nwidth = 32\n', encoding="utf-8-sig")
    sizes = lambda *more: vars(train_options(["train", "--config", str(file), *more]).run.model)
    assert (sizes()["patch"], sizes()["width"]) == (2, 32)
    assert (sizes("--preset", "vit-s16")["patch"], sizes("--preset", "vit-s16")["width"]) == (16, 384)


def test_config_with_a_mistake_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "c.toml"
    for content, said in (
        ("rhoo = 0.1", "'rhoo' is not the name of an option"),
        ("rho = [", "is not TOML"),
        ("rho = '0.1'", "rho must be a number, got '0.1'"),
        ("tied = 1", "tied must be true or false, got 1"),
        ("[rho]\nx = 1", "rho must be a number"),
        ("rho = -1", "--rho must be"),
    ):
        file.write_text(content)
        assert fsam("train", "--config", file) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert fsam("train", "--config", tmp_path / "none.toml") == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_diverged_run_exits_with_1(share, text, tmp_path, capsys, monkeypatch):
    """A run with more than a quarter of its steps skipped has diverged."""
    step = TorchEngine.step

    def skipping(self, tokens, index):
        report = step(self, tokens, index)()
        return lambda: report._replace(skipped=index % 10 < 10 * share)

    monkeypatch.setattr(TorchEngine, "step", skipping)
    figures = tmp_path / "figures.json"
    code = fsam(*command(text, tmp_path / "run", "torch", "--steps", 10, "--json", figures))
    assert code == (1 if share > 0.25 else 0)
    assert json.loads(figures.read_text())["status"] == ("diverged" if code else "finished")
    assert ("fsam: error: the run has diverged: 5 of 10 steps" in capsys.readouterr().err) == bool(code)


def test_infinite_validation_loss_exits_with_1(text, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchEngine, "evaluate", lambda self, batches, average=True: Evaluation(math.nan, {}))
    assert fsam(*command(text, tmp_path / "run", "torch", "--steps", 2)) == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_correction_is_measured_and_changes_nothing(framework, text, tmp_path):
    """The figures are those of the gradients themselves; the weights are those of a run without the measurement."""
    plain, measured = (command(text, tmp_path / x, framework, *WSD, "--steps", 6, "--rho", 0.5) for x in "ab")
    assert fsam(*plain) == 0
    assert fsam(*measured, "--correction-every", 2) == 0
    assert_same_weights(final_weights(plain), final_weights(measured))
    found = [x for x in lines(tmp_path / "b") if "correction_ratio" in x]
    assert [x["step"] for x in found] == [2, 4, 6]
    for x in found:
        assert 0 < x["correction_ratio"] < 2
        assert 0 < x["correction_cosine"] < 1


def test_correction_is_the_same_in_both_frameworks(tmp_path, text):
    found = {}
    for framework, engine in (("jax", JaxEngine), ("torch", TorchEngine)):
        settings = train_options(command(text, tmp_path, framework, "--steps", 4)).settings()
        model = engine(settings)
        tokens = np.random.default_rng(0).integers(0, 300, (4, 17), dtype=np.int32)
        model.step(tokens, 0)()
        one = model.correction(tokens, 1)
        report = model.step(tokens, 1)()
        # The law of cosines: what was measured belongs to the step that is taken then.
        g, g_hat = report.base_norm, report.grad_norm
        square = g_hat**2 + g**2 - 2 * one.correction_cosine * g_hat * g
        assert one.correction_ratio == pytest.approx(math.sqrt(square) / g, rel=1e-3)
        found[framework] = one
    assert found["jax"] == pytest.approx(found["torch"], rel=1e-3)
