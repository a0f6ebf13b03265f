"""`fsam train|compare|tune|evaluate|sharpness --task images`: real runs on scikit-learn's digits."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from rank_runs import figures, torchrun
from small_runs import final_weights, fsam, fsam_process, steps_done

from fsam_trainers.data.images import HeldOut, load
from fsam_trainers.pretrained import find
from fsam_trainers.torch.inference import image_logits

SIZES = ("--layers", 1, "--width", 16, "--heads", 4, "--batch", 8, "--learning-rate", 0.01)
AUGMENTED = ("--crop-padding", 1, "--flip", "--mixup", 0.3, "--label-smoothing", 0.1, "--dropout", 0.1)
FRAMEWORKS = ("jax", "torch")


def arguments(out: Path, *more: object, command: str = "train") -> list[str]:
    pace = ("--evaluate-every", 4, "--checkpoint-every", 4, "--quiet")
    pace += ("--probe-steps", 0) if command == "train" else ()
    every = (command, "--task", "images", "--steps", 8, *SIZES, *pace, *more, "--out", out)
    return [str(x) for x in every]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in each framework, with every augmentation but dropout, whose draws are the framework's own."""
    root = tmp_path_factory.mktemp("runs")
    for framework in FRAMEWORKS:
        assert fsam(*arguments(root / framework, "--framework", framework, *AUGMENTED[:-2])) == 0
    return root


def test_both_frameworks_take_the_same_steps(runs):
    one, other = (lines(runs / framework) for framework in FRAMEWORKS)
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "base_norm", "grad_norm", "val_loss", "val_accuracy"):
            assert a.get(name) == (None if b.get(name) is None else pytest.approx(b[name], rel=2e-4)), name
    assert {"val_loss", "val_accuracy"} <= one[-1].keys()
    assert "val_top5" not in one[-1]


def test_an_evaluation_is_of_every_held_out_image(runs):
    """179 images, of which the last batch of 8 has 3."""
    found = find(str(runs / "torch"), "RUN")
    images = load("digits").validation
    z = image_logits(found.config, found.weights())(images.array).astype(np.float64)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    last = lines(runs / "torch")[-1]
    assert len(HeldOut(images, 8)[-1]["labels"]) == 3
    assert last["val_loss"] == pytest.approx(-logp[np.arange(179), images.labels].mean(), rel=1e-5)
    assert last["val_accuracy"] == pytest.approx((z.argmax(1) == images.labels).mean())


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_paused_run_resumes_to_the_bit(framework, tmp_path):
    options = ("--framework", framework, *AUGMENTED)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fsam(*arguments(whole, *options)) == 0
    assert fsam(*arguments(parts, *options, "--schedule", "wsd", "--decay", 0, "--steps", 5)) == 0
    assert fsam(*arguments(tmp_path / "long", *options, "--schedule", "wsd", "--decay", 0)) == 0
    assert fsam(*arguments(parts, *options, "--schedule", "wsd", "--decay", 0)) == 0
    one, other = (final_weights_of(tmp_path / name, *options) for name in ("long", "parts"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    timeless = lambda out: [{k: v for k, v in x.items() if "seconds" not in k and k != "step_ms"} for x in lines(out)]
    losses = lambda out: [x["loss"] for x in timeless(out) if "loss" in x]
    assert losses(tmp_path / "long") == losses(parts)
    # The same command changes nothing.
    before = final_weights_of(whole, *options)
    assert fsam(*arguments(whole, *options)) == 0
    assert all(np.array_equal(before[name], x) for name, x in final_weights_of(whole, *options).items())


def final_weights_of(out: Path, *options: object) -> dict[str, np.ndarray]:
    return final_weights(arguments(out, *options))


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_of_files_resumes_to_the_bit(framework, number, folder, tmp_path):
    options = ("--framework", framework, "--data", folder, *AUGMENTED, "--batch", 4, "--steps", 40)
    assert fsam(*arguments(tmp_path / "whole", *options)) == 0
    process = fsam_process(arguments(tmp_path / "killed", *options))
    while steps_done(tmp_path / "killed") < 9:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    process.wait()
    assert steps_done(tmp_path / "killed") < 40
    assert fsam(*arguments(tmp_path / "killed", *options)) == 0
    one, other = (final_weights_of(tmp_path / name, *options) for name in ("whole", "killed"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_writes_a_config_that_trains_it_again(runs, tmp_path):
    config = ("train", "--config", runs / "torch" / "config.toml", "--quiet", "--out")
    assert fsam(*config, runs / "torch") == 0  # the same run, finished
    assert fsam(*config, tmp_path / "again", "--batch", 6, "--steps", 1) == 0
    assert find(str(tmp_path / "again"), "RUN").config == find(str(runs / "torch"), "RUN").config


def test_a_run_starts_from_another_ones_weights(runs, tmp_path):
    options = ("--init-from", runs / "torch", "--framework", "torch", "--steps", 1, "--learning-rate", 1e-9)
    assert fsam(*arguments(tmp_path / "run", *options)) == 0
    assert lines(tmp_path / "run")[-1]["val_loss"] == pytest.approx(lines(runs / "torch")[-1]["val_loss"], rel=1e-5)


def test_evaluate_compares_runs_on_the_same_images(runs, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert fsam("evaluate", *(runs / framework for framework in FRAMEWORKS), "--quantize", 3, "--json", path) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["weights"] for row in rows] == ["as trained", "3 bits"] * 2
    last = lines(runs / "torch")[-1]
    assert rows[2]["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert rows[2]["val_accuracy"] == pytest.approx(last["val_accuracy"])
    assert rows[2]["difference"] == pytest.approx(rows[2]["loss"] - rows[0]["loss"], abs=1e-6)
    assert rows[2]["windows"] == 179
    assert "loss in nats an image" in capsys.readouterr().out


def test_an_exported_model_is_evaluated_as_its_run(runs, tmp_path):
    exported, path = tmp_path / "model", tmp_path / "rows.json"
    assert fsam("export", runs / "torch", "--to", "safetensors", "--out", exported) == 0
    assert fsam("evaluate", exported, "--framework", "torch", "--json", path, "--sequences", 50) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["windows"] == 50
    assert find(str(exported), "MODEL").config == find(str(runs / "torch"), "RUN").config


def refused(capsys, *command: object) -> str:
    assert fsam(*command) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fsam: error: ")
    assert "\n" not in said
    return said


def test_bad_options_are_a_sentence(runs, text, folder, tmp_path, capsys):
    run, images = runs / "torch", ("train", "--task", "images")
    for command, says in (
        ((*images, "--preset", "tiny"), "tiny is a model of text; give --task text"),
        (("train", "--preset", "vit-tiny"), "vit-tiny is a model of images; give --task images"),
        ((*images, "--patch", 3), "--patch must divide both sides of the images, 8 x 8 pixels, got 3"),
        ((*images, "--mixup", -1), "--mixup must be a finite number >= 0, got -1.0"),
        ((*images, "--data", text), "holds no images that are known"),
        (("train", "--data", text, "--init-from", run), "is a vit; it takes --task images"),
        (("evaluate", run, "--data", folder), "are 8 x 8 x 3 in 2 classes, and"),
        (("evaluate", run, "--task", "text"), "is a model of images"),
        (("evaluate", run, "--fine-tune", "x"), "--fine-tune takes models of text"),
        (("sample", run), "is a model of images, which writes no text"),
        (("export", run, "--to", "hf", "--out", tmp_path / "hf"), "which --to hf does not write"),
        (arguments(run, "--framework", "torch", "--label-smoothing", 0.1), "holds a run on other data"),
    ):
        assert says in refused(capsys, *command), command


@pytest.mark.slow
def test_compare_shows_accuracies(tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--framework", "torch", "--methods", "adamw,sam:rho=0.05", "--seeds", 2)
    assert fsam(*arguments(out, *more, command="compare")) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert "accuracy" in found["columns"]
    assert all(len(row["val_accuracies"]) == 2 for row in found["rows"])
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_tune_finds_a_learning_rate(tmp_path, capsys):
    grid = ("--method", "sam", "--grid", "learning-rate=1e-3,1e-2", "--framework", "torch")
    assert fsam(*arguments(tmp_path / "out", *grid, command="tune")) == 0
    assert "--task images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_sharpness_of_a_run(runs, framework, tmp_path):
    path = tmp_path / "rows.json"
    options = ("--tokens", 256, "--checkpoints", "last", "--out", tmp_path / "page.html", "--json", path, "--quiet")
    assert fsam("sharpness", runs / framework, *options) == 0
    (row, *_) = json.loads(path.read_text())["rows"]
    assert np.isfinite([x for x in row.values() if isinstance(x, float)]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--fsdp", 2), ("--fsdp", 2, "--dtype", "bfloat16"), ("--tensor-parallel", 2, "--no-biases")],
    ids=["replicas", "fsdp", "bf16", "tensor"],
)
def test_two_ranks_take_the_steps_of_one_process(more, tmp_path):
    options = ("--framework", "torch", *AUGMENTED[:-2], "--micro-batches", 2, "--savings", "balanced", "--batch", 16)
    assert fsam(*arguments(tmp_path / "alone", *options, *more[2:])) == 0
    process = torchrun(2, arguments(tmp_path / "run", *options, *more))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    close = {"rel": 2e-2 if "bfloat16" in more else 1e-4}
    mine, other = figures(tmp_path / "run"), figures(tmp_path / "alone")
    assert mine == {key: pytest.approx(value, **close) for key, value in other.items()}
    assert lines(tmp_path / "run")[-1]["val_accuracy"] == pytest.approx(
        lines(tmp_path / "alone")[-1]["val_accuracy"], abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("placement", [("--data-parallel", 2), ("--fsdp", 2), ("--tensor-parallel", 2)])
def test_a_mesh_takes_the_steps_of_one_device(placement, runs, tmp_path):
    assert fsam(*arguments(tmp_path / "run", "--framework", "jax", *AUGMENTED[:-2], *placement)) == 0
    for a, b in zip(lines(tmp_path / "run"), lines(runs / "jax"), strict=True):
        for name in ("loss", "grad_norm", "val_loss", "val_accuracy"):
            assert (name in a) == (name in b)
            assert name not in a or a[name] == pytest.approx(b[name], rel=1e-4), name
