"""`fsam evaluate`: the run's own loss, standard errors, rounding, noise and paired differences."""

import json
import math

import numpy as np
import pytest
from small_runs import arguments, fsam
from trained_runs import FRAMEWORKS, runs, saved  # noqa: F401

from fsam_trainers.evaluation import held_out, mean_of
from fsam_trainers.pretrained import find
from fsam_trainers.quantize import noisy, rounded


def rows_of(tmp_path, *arguments) -> dict[tuple[str, str, str], dict]:
    """The figures of a command by (model, weights, data)."""
    out = tmp_path / "figures.json"
    assert fsam("evaluate", *arguments, "--quiet", "--json", out) == 0
    return {(row["model"], row["weights"], row["data"]): row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_is_that_of_the_runs_last_evaluation(framework, runs, text, tmp_path):  # noqa: F811
    evaluated = [json.loads(x).get("val_loss") for x in (runs[framework] / "metrics.jsonl").read_text().splitlines()]
    run = str(runs[framework])
    # A run's evaluation reads 16 batches of 4 windows; without --data it is of the run's own text.
    row = rows_of(tmp_path, run, "--sequences", 64)[run, "as trained", str(text)]
    assert row["loss"] == pytest.approx(evaluated[-1], abs=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert 0 < row["loss_error"] < 0.1
    assert row["perplexity_error"] == pytest.approx(row["perplexity"] * row["loss_error"])
    assert (row["windows"], row["tokens"], row["method"], row["steps"]) == (64, 64 * 16, "adamw", 6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_of_prompts_is_a_mean_over_answers(framework, tmp_path):
    rows = [{"prompt": f"What is {n * n}?" * (n % 7), "answer": f"{n} times {n}" * (n % 3)} for n in range(300)]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fsam(*arguments(data, tmp_path / "run", "--framework", framework, "--method", "adamw", "--steps", 1)) == 0
    evaluated = [json.loads(x).get("val_loss") for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    run = str(tmp_path / "run")
    windows = held_out(find(run, "RUN"), str(data), None, 16, 64, {})
    row = rows_of(tmp_path, run, "--data", data, "--sequences", len(windows) // 4 * 4)[run, "as trained", str(data)]
    targets = (windows[: row["windows"], 1:] >= 0).sum(1)
    assert targets.min() < targets.max()
    assert row["tokens"] == targets.sum()
    assert row["loss"] == pytest.approx(evaluated[-1], abs=1e-5)


def test_a_text_may_have_a_comma_in_its_name(text, tmp_path):
    named, run = tmp_path / "notes, v2.txt", str(tmp_path / "run")
    named.write_text(text.read_text())
    assert fsam(*arguments(named, tmp_path / "run", "--framework", "torch", "--method", "adamw", "--steps", 1)) == 0
    assert list(rows_of(tmp_path, run, "--sequences", 4)) == [(run, "as trained", str(named))]
    assert list(rows_of(tmp_path, run, "--sequences", 4, "--data", named)) == [(run, "as trained", str(named))]
    both = rows_of(tmp_path, run, "--sequences", 4, "--data", f"{text},python")
    assert [name for _, _, name in both] == [str(text), "python"]


def test_a_run_is_evaluated_on_the_column_that_it_was_trained_on(tmp_path):
    rows = [{"text": "one two " * 9, "other": f"{n * n} is {n} times {n}. " * 3} for n in range(200)]
    data, run = tmp_path / "a.jsonl", str(tmp_path / "run")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--framework", "torch", "--method", "adamw", "--steps", 2, "--text-column", "other")
    assert fsam(*arguments(data, tmp_path / "run", *more, "--evaluation-batches", 2)) == 0
    evaluated = [json.loads(x).get("val_loss") for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = rows_of(tmp_path, run, "--sequences", 8)[run, "as trained", str(data)]
    assert row["loss"] == pytest.approx(evaluated[-1], abs=1e-5)


def test_both_frameworks_give_the_same_losses_of_changed_weights(runs, text, tmp_path):  # noqa: F811
    run = str(runs["torch"])
    more = ("--data", text, "--sequences", 20, "--quantize", "8,3", "--noise", "0.5")
    found = [rows_of(tmp_path, run, *more, "--framework", framework) for framework in FRAMEWORKS]
    assert [key[1] for key in found[0]] == ["as trained", "8 bits", "3 bits", "noise 0.5"]
    for key, row in found[0].items():
        assert row["loss"] == pytest.approx(found[1][key]["loss"], abs=1e-5)
    losses = {key[1]: row["loss"] for key, row in found[0].items()}
    assert abs(losses["8 bits"] - losses["as trained"]) < abs(losses["3 bits"] - losses["as trained"])
    assert losses["noise 0.5"] > losses["as trained"]


def test_models_are_compared_by_differences_of_the_same_windows(runs, text, tmp_path):  # noqa: F811
    one, two = (str(runs[framework]) for framework in FRAMEWORKS)
    found = rows_of(tmp_path, one, two, "--data", f"{text},{text}", "--sequences", 30, "--noise", "0.1")
    for weights in ("as trained", "noise 0.1"):
        a, b = (found[model, weights, str(text)] for model in (one, two))
        assert (a["difference"], a["difference_error"]) == (None, None)
        assert b["difference"] == pytest.approx(b["loss"] - a["loss"], abs=1e-12)
        assert 0 < b["difference_error"] < math.hypot(a["loss_error"], b["loss_error"])


def test_the_same_weights_do_not_differ_whoever_saved_them(runs, text, tmp_path):  # noqa: F811
    run, copy = str(runs["jax"]), str(tmp_path / "copy")
    assert fsam("export", run, "--out", copy) == 0
    more = ("--data", text, "--sequences", 10, "--noise", "0.3", "--quantize", "4", "--framework", "torch")
    for (model, _, _), row in rows_of(tmp_path, run, copy, *more).items():
        assert row["difference"] == (None if model == run else 0)


def test_models_with_other_tokens_have_no_difference(runs, text, tmp_path):  # noqa: F811
    other = tmp_path / "other.json"
    read = json.loads((runs["torch"] / "tokenizer.json").read_text())
    read["model"]["merges"] = read["model"]["merges"][:10]
    other.write_text(json.dumps(read))
    saved(tmp_path / "model", vocab_size=300, tokenizer=other)
    (tmp_path / "model" / "other.json").rename(tmp_path / "model" / "tokenizer.json")
    more = ("--data", text, "--framework", "torch", "--sequences", 5)
    rows = rows_of(tmp_path, str(runs["torch"]), str(tmp_path / "model"), *more)
    assert [row["difference"] for row in rows.values()] == [None, None]


def test_a_soft_cap_is_part_of_the_model(text, tmp_path):
    tokens = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 31, 2000).astype("<u2").tofile(tokens)
    capped, plain = (str(saved(tmp_path / str(cap), soft_cap=cap)) for cap in (0.5, 0.0))
    rows = rows_of(tmp_path, capped, plain, "--data", tokens, "--framework", "torch")
    assert abs(rows[capped, "as trained", str(tokens)]["loss"] - math.log(31)) < 0.2
    assert rows[plain, "as trained", str(tokens)]["difference"] != 0


def test_rounding_is_to_the_nearest_of_the_levels_of_each_channel():
    draw = np.random.default_rng(0)
    weights = {name: draw.standard_normal((5, 7)).astype(np.float32) for name in ("embedding", "block_0.qkv")}
    weights["block_0.qkv"][:, 2] = 0
    weights |= {"positions": weights["embedding"].copy(), "final_norm": np.ones(7, np.float32)}
    found = rounded(weights, 3)
    for name, axis in (("embedding", 1), ("block_0.qkv", 0)):
        step = np.abs(weights[name]).max(axis=axis, keepdims=True) / 3
        assert np.abs(found[name] - weights[name]).max() <= step.max() / 2 + 1e-6
        levels = found[name] / np.where(step > 0, step, 1)
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-5)
        assert np.abs(np.rint(levels)).max() == 3
    assert (found["block_0.qkv"][:, 2] == 0).all()
    assert all(found[name] is weights[name] for name in ("positions", "final_norm"))


def test_noise_is_relative_to_each_matrix():
    weights = {"embedding": np.full((200, 50), 2, np.float32), "head": np.full((200, 50), 0.1, np.float32)}
    found = noisy(weights, 0.5, seed=1)
    for name, w in weights.items():
        assert (found[name] - w).std() == pytest.approx(0.5 * w[0, 0], rel=0.05)
    again, other = noisy(weights, 0.5, seed=1), noisy(weights, 0.5, seed=2)
    assert np.array_equal(found["head"], again["head"])
    assert not np.array_equal(found["head"], other["head"])


def test_a_standard_error_is_that_of_independent_windows():
    assert mean_of(np.array([1.0, 3.0]), np.array([16, 16])) == (2.0, 1.0)
    assert mean_of(np.array([1.5]), np.array([16])) == (1.5, None)
    # 30 targets of loss 1 and 10 of loss 3, in two windows: (30 · 1 + 10 · 3) / 40; sqrt(2 (15² + 15²)) / 40.
    assert mean_of(np.array([1.0, 3.0]), np.array([30, 10])) == (1.5, 0.75)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--quantize", "8,x"), "--quantize must be numbers of bits from 2 to 16: 8,4,3, got '8,x'"),
        (("--quantize", "1"), "--quantize must be numbers of bits from 2 to 16"),
        (("--noise", "-0.1"), "--noise must be finite numbers > 0"),
        (("--noise", "inf"), "--noise must be finite numbers > 0"),
        (("--draws", 0), "--draws must be at least 1, got 0"),
        (("--seq-len", 10), "--seq-len must be at most 9, that of"),
        (("--framework", "numpy"), "--framework must be jax or torch, got 'numpy'"),
        (("--data", "TEXT"), "has no tokenizer.json or tokenizer.model beside its weights; give --tokenizer FILE"),
        (("--data", ","), "--data"),
    ],
)
def test_wrong_options_are_one_sentence(more, says, text, tmp_path, capsys):
    tokens = tmp_path / "tokens.bin"
    np.zeros(2000, "<u2").tofile(tokens)
    folder = saved(tmp_path / "model")
    more = [text if x == "TEXT" else x for x in more]
    assert fsam("evaluate", folder, "--data", tokens, "--quiet", *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_no_model_is_one_sentence(capsys):
    assert fsam("evaluate") == 2
    assert "MODELS: give at least one" in capsys.readouterr().err


def test_fine_tuning_shows_what_is_learned_and_forgotten(runs, text, tmp_path):  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(20)))
    model, out = str(runs["torch"]), tmp_path / "out"
    more = ("--fine-tune", other, "--rates", "1e-4,1e-2", "--steps", 15, "--batch", 4, "--sequences", 30, "--out", out)
    rows = rows_of(tmp_path, model, "--data", text, *more)
    low, high = (str(out / "model-0" / f"rate-{rate}") for rate in ("0.0001", "0.01"))
    assert {key[0] for key in rows} == {model, low, high}
    learned, forgotten = ([rows[run, "as trained", str(data)] for run in (low, high)] for data in (other, text))
    assert [row["rate"] for row in learned] == [1e-4, 1e-2]
    assert learned[1]["difference"] < learned[0]["difference"] < 0
    assert learned[1]["difference"] < forgotten[1]["difference"]
    assert (out / "forgetting.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("files.json")}
    assert rows_of(tmp_path, model, "--data", text, *more) == rows
    assert {path: path.stat().st_mtime_ns for path in out.rglob("files.json")} == before  # taken as they were


def test_a_model_fine_tuned_on_ids_keeps_its_tokenizer_for_texts(runs, text, tmp_path):  # noqa: F811
    ids, model = tmp_path / "ids.bin", str(runs["torch"])
    np.random.default_rng(0).integers(0, 300, 2000).astype(np.uint16).tofile(ids)
    more = ("--rates", "1e-2", "--steps", 2, "--batch", 2, "--sequences", 4, "--out", tmp_path / "out")
    rows = rows_of(tmp_path, model, "--data", text, "--fine-tune", ids, *more)
    assert rows[str(tmp_path / "out/model-0/rate-0.01"), "as trained", str(text)]["difference"] != 0


def test_fine_tuning_options_are_checked(tmp_path, capsys):
    assert fsam("evaluate", saved(tmp_path / "model"), "--fine-tune", "x", "--rates", "0") == 2
    assert "--rates must be finite numbers > 0: 1e-5,1e-4, got '0'" in capsys.readouterr().err
