"""`fsam sharpness`: the numerics on matrices of known spectrum, and the command on small runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fsam_core import UserError
from fsam_core.curvature import shares
from fsam_kernels import spec
from fsam_profiling.sharpness import cli, measure, numerics, report
from fsam_profiling.sharpness.subjects import Curvatures, _settings, find, micro_batches, subjects, windows
from fsam_trainers import cli as commands
from fsam_trainers import loop

N = 60


def matrix(spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    return q @ np.diag(spectrum) @ q.T


def random() -> np.random.Generator:
    return np.random.default_rng(1)


SPECTRUM = np.concatenate([np.linspace(-0.5, 1, N - 4), [-3.0, 4.0, 7.0, 11.0]])


# --- numerics ---------------------------------------------------------------------------------------------------------


def test_eigenvalues_of_a_known_spectrum():
    A = matrix(SPECTRUM)
    found = numerics.extremes(lambda v: A @ v, N, 3, random(), tolerance=1e-10)
    assert found.largest == pytest.approx([11, 7, 4], abs=1e-8)
    assert found.smallest == pytest.approx(-3, abs=1e-8)
    assert found.converged
    assert found.products < N
    for value, vector in zip(found.largest, found.vectors, strict=False):
        assert np.linalg.norm(A @ vector - value * vector) < 1e-8


def test_repeated_eigenvalues_and_small_matrices():
    A = matrix(np.array([2.0, 2.0, 2.0, 1.0, 0.0, 0.0]))
    found = numerics.extremes(lambda v: A @ v, 6, 3, random(), tolerance=1e-10)
    assert found.largest == pytest.approx([2, 2, 2], abs=1e-10)
    assert found.smallest == pytest.approx(0, abs=1e-10)
    alone = numerics.extremes(lambda v: 5 * v, 1, 3, random())
    assert (alone.largest, alone.smallest) == ([5.0], 5.0)


def test_eigenvalues_that_have_not_converged_say_so():
    A = matrix(np.linspace(0, 1, 200))
    found = numerics.extremes(lambda v: A @ v, 200, 3, random(), most=8, tolerance=1e-8)
    assert not found.converged
    assert abs(found.largest[0] - 1) <= found.residuals[0]


def test_eigenvalues_in_float32():
    A = matrix(SPECTRUM).astype(np.float32)
    found = numerics.extremes(lambda v: A @ v, N, 2, random(), dtype=np.float32)
    assert found.largest == pytest.approx([11, 7], rel=1e-4)


def test_a_small_eigenvalue_of_many_weights_is_found_in_float32():
    """β falls below what rounding of so many numbers adds up to, long before the basis spans anything invariant."""
    n = 100_000
    d = np.concatenate([[60, 30, -0.3], np.random.default_rng(0).uniform(-0.01, 0.01, n - 3)]).astype(np.float32)
    found = numerics.extremes(lambda v: d * v, n, 3, random(), most=60, dtype=np.float32)
    assert found.largest[:2] == pytest.approx([60, 30], rel=1e-4)
    assert found.smallest == pytest.approx(-0.3, abs=1e-4 * 60)
    assert max(found.residuals) > 0


def test_traces_are_within_three_standard_errors():
    A = matrix(SPECTRUM)
    estimates = [numerics.trace(lambda v: A @ v, N, 30, np.random.default_rng(i)) for i in range(20)]
    off = np.array([(x.value - SPECTRUM.sum()) / x.error for x in estimates])
    assert (np.abs(off) < 3).mean() >= 0.9  # ten draws have heavier tails than a Gaussian
    assert np.std([x.value for x in estimates]) == pytest.approx(np.mean([x.error for x in estimates]), rel=0.5)
    assert abs(np.mean([x.value for x in estimates]) - SPECTRUM.sum()) < 3 * np.std(off) / np.sqrt(20)
    low_rank = matrix(np.concatenate([np.zeros(N - 3), [1.0, 2.0, 3.0]]))
    exact = numerics.trace(lambda v: low_rank @ v, N, 30, random())
    assert exact.value == pytest.approx(6, abs=1e-10)
    assert exact.error < 1e-10


def test_densities_have_the_moments_of_the_spectrum():
    A = matrix(SPECTRUM)
    values, weights = numerics.density(lambda v: A @ v, N, random(), probes=200, steps=12)
    assert weights.sum() == pytest.approx(1)
    assert weights @ values == pytest.approx(SPECTRUM.mean(), abs=0.1)
    assert weights @ values**2 == pytest.approx((SPECTRUM**2).mean(), rel=0.15)
    assert values.max() == pytest.approx(11, abs=1e-3)


def test_a_product_is_not_changed_in_place():
    kept = np.diag(np.arange(4.0))
    rows = list(kept)
    found = numerics.extremes(lambda v: rows[int(np.argmax(np.abs(v)))], 4, 1, random(), most=2)
    assert found.products == 2
    assert np.array_equal(np.stack(rows), np.diag(np.arange(4.0)))


# --- the command ------------------------------------------------------------------------------------------------------

SIZES = ["--layers", "1", "--width", "16", "--heads", "2", "--seq-len", "16", "--vocab-size", "300"]


def fsam(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        commands.main([str(x) for x in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["a", "tree", "of", "arrays", "is", "no", "array"], 6000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    """Four steps in PyTorch, which compiles nothing, with a checkpoint after two."""
    out = tmp_path_factory.mktemp("runs") / "small"
    more = ["--framework", "torch", "--data", text, "--out", out, "--batch", 4, "--steps", 4, "--checkpoint-every", 2]
    assert fsam("train", *SIZES, *more, "--probe-steps", 0, "--rho", 0.3, "--learning-rate", 0.01, "--quiet") == 0
    return out


def arguments(run: Path, text: Path, out: Path, *more: object) -> list[object]:
    return ["sharpness", run, "--data", text, "--tokens", 128, "--out", out / "report.html", "--quiet", *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_every_checkpoint_is_measured_and_the_last_fully(run, text, tmp_path, capsys):
    more = ("--eigen", 2, "--trace", "--trace-products", 6, "--density", "--landscape", "2d", "--rho", 0.05)
    assert fsam(*arguments(run, text, tmp_path, *more, "--json", tmp_path / "s")) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    rows = rows_of(tmp_path / "s")
    found = [(row["step"], row["direction"], row["radius"]) for row in rows if row["what"] == "shares"]
    assert found == [(step, d, r) for step in (2, 4) for d in ("gradient", "adam") for r in (0, 0.05)]
    for row in rows:
        if row["what"] == "shares":
            assert row["gauss_newton"] + row["functional"] + row["cross"] == pytest.approx(1)
    of = lambda what: [row for row in rows if row["what"] == what]
    assert [(row["step"], row["matrix"]) for row in of("spectrum")] == [(4, "H"), (4, "G")]
    assert [row["matrix"] for row in of("trace")] == [row["matrix"] for row in of("density")] == ["H", "G"]
    assert of("spectrum")[1]["smallest"] > -1e-3 * of("spectrum")[1]["eigenvalues"][0]
    (plane,) = of("plane")
    assert np.shape(plane["losses"]) == (11, 11)
    centre = plane["losses"][5][5]
    assert centre == pytest.approx(of("shares")[-1]["loss"], rel=1e-5)
    # Along the first eigenvector the loss has the curvature of the first eigenvalue.
    second = (plane["losses"][6][5] + plane["losses"][4][5] - 2 * centre) / (plane["distances"][6]) ** 2
    assert second == pytest.approx(of("spectrum")[0]["eigenvalues"][0], rel=0.1)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert "Shares of H d" in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_rows_are_the_products_of_the_curvature(run, text, tmp_path):
    more = ("--checkpoints", "last", "--dtype", "float64", "--directions", "adam", "--json", tmp_path / "s")
    assert fsam(*arguments(run, text, tmp_path, *more)) == 0
    at_zero, at_rho = rows_of(tmp_path / "s")
    (source,) = find([str(run)])
    (subject,) = subjects(source, None, "last")
    assert subject.moments is not None
    with Curvatures(windows([source], str(text), None, 128), "float64", "exact").of(subject) as curvature:
        g = curvature.vector(curvature.gradient)
        v = np.concatenate([subject.moments.second[name].ravel() for name in curvature.params]).astype(np.float64)
        c = spec.clip_factor([g], 1.0) * g
        v_hat = (0.95 * v + 0.05 * c**2) / (1 - 0.95**5)
        d = c / (np.sqrt(v_hat) + 1e-8)
        G_d, N_d = map(curvature.vector, curvature.both(curvature.tree(d)))
        wanted = shares(d, G_d, N_d)
        H_d, *others = map(curvature.vector, curvature.secants(curvature.tree(d), 0.3))
        far = shares(d, *others, H_d)
    for row, want in ((at_zero, wanted), (at_rho, far)):
        assert row["direction"] == "adam"
        for name, value in want._asdict().items():
            assert row[name] == pytest.approx(value, rel=1e-9)
    assert at_zero["functional"] != pytest.approx(at_rho["functional"], rel=1e-3)


def test_one_checkpoint_and_a_line_of_losses(run, text, tmp_path):
    files = ("--json", tmp_path / "s", "--plot", tmp_path / "shares.svg")
    more = ("--directions", "gradient", "--landscape", "1d", "--rho", 0.01, *files)
    assert fsam(*arguments(run / "checkpoints" / "step_00000002", text, tmp_path, *more)) == 0
    *of_shares, line = rows_of(tmp_path / "s")
    assert [row["step"] for row in of_shares] == [2, 2]
    assert (tmp_path / "shares.svg").read_text(encoding="utf-8").startswith("<svg")
    middle, step = len(line["losses"]) // 2, line["distances"][1] - line["distances"][0]
    slope = (line["losses"][middle + 1] - line["losses"][middle - 1]) / (2 * step)
    assert slope == pytest.approx(of_shares[0]["gradient_norm"], rel=0.02)


def test_both_frameworks_measure_a_run_alike(run, text, tmp_path):
    found = {}
    for framework in ("jax", "torch"):
        more = ("--framework", framework, "--dtype", "float64", "--json", tmp_path / framework)
        assert fsam(*arguments(run, text, tmp_path, *more)) == 0
        found[framework] = rows_of(tmp_path / framework)
    assert len(found["jax"]) == 8
    for a, b in zip(found["jax"], found["torch"], strict=True):
        assert {k: v for k, v in a.items() if not isinstance(v, float)} == {
            k: v for k, v in b.items() if not isinstance(v, float)
        }
        for name in ("gauss_newton", "functional", "norm", "loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-8)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_training_measures_what_the_command_does(framework, text, tmp_path):
    """--sharpness-every on the first held-out batch, which changes no weight."""
    more = ["--framework", framework, "--data", text, "--batch", 4, "--steps", 4, "--probe-steps", 0, "--quiet"]
    for name, options in (("plain", ()), ("measured", ("--sharpness-every", 2, "--checkpoint-every", 2))):
        assert fsam("train", *SIZES, *more, *options, "--out", tmp_path / name) == 0
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("plain", "measured")}
    plain, measured = ([json.loads(x) for x in of.splitlines() if "learning_rate" in x] for of in lines.values())
    assert [x["loss"] for x in plain] == [x["loss"] for x in measured]
    found = {x["step"]: (x["share_logits"], x["share_function"]) for x in measured if "share_logits" in x}
    asked = arguments(tmp_path / "measured", text, tmp_path, "--directions", "gradient", "--json", tmp_path / "s")
    assert fsam(*asked, "--tokens", 64) == 0
    rows = [row for row in rows_of(tmp_path / "s") if row["radius"] == 0]
    assert [row["step"] for row in rows] == list(found) == [2, 4]
    for row in rows:
        assert found[row["step"]] == pytest.approx((row["gauss_newton"], row["functional"]), rel=1e-4)


def test_runs_of_one_name_are_told_apart(run, text, tmp_path):
    names = []
    for parent in ("a", "b"):
        shutil.copytree(run, tmp_path / parent / run.name)
        names.append(tmp_path / parent / run.name)
    more = (
        "--checkpoints",
        "last",
        "--eigen",
        1,
        "--directions",
        "gradient",
        "--data",
        text,
        "--tokens",
        64,
        "--quiet",
    )
    asked = ("--json", tmp_path / "s", "--out", tmp_path / "r.html")
    assert fsam("sharpness", *names, f"{run}@2", *more, *asked) == 0
    rows = rows_of(tmp_path / "s")
    apart = [f"a/{run.name}", f"b/{run.name}", f"{run.parent.name}/{run.name}@2"]
    assert list(dict.fromkeys(row["run"] for row in rows)) == [*apart[:2], apart[2].removesuffix("@2")]
    assert [row["step"] for row in rows if row["what"] == "spectrum" and row["matrix"] == "H"] == [4, 4, 2]
    assert [cells[0] for cells in report.end_cells(rows)][::2] == list(dict.fromkeys(row["run"] for row in rows))


def test_training_in_several_processes_measures_nothing(monkeypatch):
    monkeypatch.setattr(loop.processes, "current", lambda: SimpleNamespace(count=2))
    with pytest.raises(UserError, match="--sharpness-every takes one process"):
        loop._shares(None, np.zeros((2, 3)), None)


def test_an_interruption_leaves_what_is_done(run, text, tmp_path, monkeypatch, capsys):
    steps = iter(range(100))

    def interrupted(*given: Any) -> Any:
        for row in measure.measure(*given):
            if next(steps) == 5:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(cli, "measure", interrupted)
    assert cli.main([str(x) for x in arguments(run, text, tmp_path, "--json", tmp_path / "s")[1:]]) == 130
    assert len(rows_of(tmp_path / "s")) == 5
    assert (tmp_path / "report.html").is_file()
    assert "5 rows were finished" in capsys.readouterr().err


def test_bad_input_is_one_sentence(run, text, tmp_path, capsys):
    def message(*given: object) -> str:
        assert fsam("sharpness", *given, "--out", tmp_path / "r.html", "--quiet") == 2
        return capsys.readouterr().err

    assert "RUNS: give at least one" in message()
    assert "is not there" in message(tmp_path / "nowhere")
    assert "--directions must be some of gradient, adam, got 'momentum'" in message(run, "--directions", "momentum")
    assert "--tokens must be at least 1" in message(run, "--tokens", 0)
    assert "--rho must be a finite number > 0" in message(run, "--rho", -1)
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "checkpoints" / "step_00000002" / "run.json").open("a").write(" ")
    assert "is damaged: run.json" in message(damaged, "--data", text)


def test_a_model_without_a_training_state_has_no_adam_direction(run, text):
    (source,) = find([str(run)])
    (subject,) = subjects(source, None, "last")
    subject = subject._replace(moments=None)
    with Curvatures(windows([source], str(text), None, 64), "float32", "exact").of(subject) as curvature:
        wanted = measure.Wanted()
        rows = list(measure.measure(subject, curvature, wanted, False, lambda: None))
        assert [(row["direction"], row["radius"]) for row in rows] == [("gradient", 0.0), ("gradient", 0.5)]
        with pytest.raises(UserError, match="--directions: adam needs the moments"):
            list(measure.measure(subject, curvature, measure.Wanted(("adam",)), False, lambda: None))
        curvature.gradient = {name: 0 * x for name, x in curvature.gradient.items()}
        with pytest.raises(UserError, match="the gradient of small at step 4 is 0"):
            list(measure.measure(subject, curvature, wanted, False, lambda: None))


def test_a_run_is_read_by_one_process_without_its_origin(run):
    recorded = json.loads((run / "checkpoints" / "step_00000004" / "run.json").read_text(encoding="utf-8"))["settings"]
    changes = {"data_parallel": 8, "fsdp": 4, "init_from": "gone", "of_a_later_version": 1, "compile": True}
    assert _settings({**recorded, **changes}) == _settings(recorded)


def test_windows_are_split_into_equal_micro_batches():
    for count, most in ((1, 1), (8, 8), (12, 6), (13, 1), (16, 8)):
        parts = micro_batches(np.zeros((count, 3)))
        assert {len(x) for x in parts} == {most}


def test_an_eigenvalue_that_has_not_converged_is_marked():
    row = {"what": "spectrum", "run": "a", "step": 1, "matrix": "H", "eigenvalues": [2.0, 1.0], "smallest": -1.0}
    assert report.end_cells([{**row, "converged": False}])[0][3:6] == ["≈2", "≈1", "≈-1"]
    assert report.end_cells([{**row, "converged": True}])[0][3:6] == ["2", "1", "-1"]
