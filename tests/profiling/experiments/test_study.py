"""The study's plan, its runs, and its page from invented results."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import spawn
from rich.console import Console as Rich

import study
import study_plan
import study_report
import study_run
from fsam_core import UserError
from fsam_trainers.processes import Stopped
from study_plan import ADAMW, DECAY, REGIMES, SMALL, TUNING_SEED, Entry, Regime, Row, entries, settings_of

SAM = {"SAM": Row("sam", {})}
PLAN = Regime("A test", SMALL, "python", 8_000, 160, alone=SAM, equal_time=SAM, seeds=2)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of `PLAN` whose loss at the end is |log₂ ρ / 0.4| + the seed's; `trained` lists them."""
    monkeypatch.setitem(REGIMES, "test", PLAN)
    found = study_run.Runs("test", tmp_path / "runs", tmp_path / "results" / "study" / "test.jsonl")
    trained = []

    def train(self, settings, key, step):
        trained.append((settings.seed, settings.rho, step, settings.steps))
        loss = abs(math.log2(settings.rho / 0.4)) + settings.seed / 1000
        best = {"best_val_loss": loss, "best_step": step, "curve": [[step, loss]], "skipped_steps": 0}
        return {"val_loss": loss, "steps": settings.steps, **best}

    corpus = type("Corpus", (), {"fingerprint": "text"})
    monkeypatch.setattr(study_run.Runs, "corpus", lambda self: corpus)
    monkeypatch.setattr(study_run.Runs, "_trained", train)
    return found, trained


@pytest.mark.parametrize("name", REGIMES)
def test_every_row_is_a_run(name):
    regime = REGIMES[name]
    labels = [entry.label for entry in entries(regime)]
    assert len(labels) == len(set(labels))
    assert ADAMW in labels
    for entry in entries(regime):
        for value in entry.row.values or (0.0,):
            one = settings_of(regime, entry.row, {entry.row.tunes: value} if entry.row.tunes else {}, 0)
            assert one.steps >= regime.steps or entry.label in study_plan.FEWER
            assert not regime.late or one.decay_start == study_plan.base_settings(regime, 0).decay_start
            assert not entry.equal_time or study_plan.at_equal_time(regime, one) < regime.steps


def test_asam_is_its_formula_and_another_run_than_sam(runs):
    asam = settings_of(PLAN, study_plan.PERTURBED["ASAM"], {"rho": 0.1}, 0)
    assert (asam.as_method().precondition, asam.as_method().norm) == ("weights", "dual")
    plain = settings_of(PLAN, Row("sam", {"norm": "dual"}), {"rho": 0.1}, 0)
    assert runs[0].key(asam) != runs[0].key(plain)
    assert runs[0].key(plain) == runs[0].key(dataclasses.replace(plain, init_from="elsewhere"))


def test_a_row_is_tuned_with_a_seed_of_its_own(runs):
    found, trained = runs
    values = study.train_entry(found, Entry("SAM", Row("sam", {})), {}, {}, math.inf)
    assert values == {"rho": 0.4}
    tuning = [run for run in trained if run[0] == TUNING_SEED]
    assert [step for _, _, step, _ in tuning] == [40] * 4 + [160] * 3  # the better half, then the one beyond
    assert max(rho for _, rho, *_ in tuning) == pytest.approx(0.8)  # the axis goes beyond its best value
    assert trained[len(tuning) :] == [(0, 0.4, 160, 160), (1, 0.4, 160, 160)]


def test_shorter_runs_tune(runs, monkeypatch):
    found, trained = runs
    monkeypatch.setitem(REGIMES, "test", dataclasses.replace(PLAN, tuning_rho=1 / 4))
    assert study.train_entry(found, Entry("SAM", Row("sam", {})), {}, {}, math.inf) == {"rho": 0.4}
    assert trained[-2:] == [(0, 0.4, 160, 160), (1, 0.4, 160, 160)]
    assert {steps for seed, *_, steps in trained if seed == TUNING_SEED} == {40}
    study.tune_entry(found, Entry(ADAMW, study_plan.RIVALS[ADAMW]), {}, math.inf)
    assert trained[-1][-1] == 160  # AdamW's options depend more on the length


def test_a_finished_run_is_not_repeated(runs):
    found, trained = runs
    entry = Entry("SAM", Row("sam", {}))
    study.train_entry(found, entry, {}, {}, math.inf)
    count = len(trained)
    study.train_entry(found, entry, {}, {}, math.inf)
    study.train_entry(found, Entry("the same by another name", Row("sam", {})), {}, {"rho": 0.4}, math.inf)
    assert len(trained) == count
    assert {line["row"] for line in found.lines()} == {"SAM (tuning)", "SAM", "the same by another name"}


def test_a_row_at_equal_time_has_fewer_steps_and_its_own_rho(runs):
    found, trained = runs
    study.train_entry(found, Entry("SAM, equal time", Row("sam", {}), equal_time=True), {}, {"rho": 0.2}, math.inf)
    assert trained == [(0, 0.2, 80, 80), (1, 0.2, 80, 80)]


def test_no_run_begins_after_the_last_minute(runs):
    found, trained = runs
    with pytest.raises(Stopped):
        study.train_entry(found, Entry("SAM", Row("sam", {})), {}, {}, time.time() - 1)
    assert not trained


def test_an_unknown_regime_is_refused(tmp_path):
    with pytest.raises(UserError, match="--regimes: rare is not known; use some of scarce, repeated, one-pass"):
        study.execute(study.Study("rare", out=tmp_path, results=tmp_path), Rich(quiet=True))


def written(tmp_path, losses, name="scarce"):
    """A file with runs: label -> the loss of each seed."""
    folder = tmp_path / "study"
    folder.mkdir()
    lines = [
        {"row": label, "seed": seed, "step": 160, "data": "text", "val_loss": loss, "best_val_loss": loss - 0.5}
        for label, of in losses.items()
        for seed, loss in enumerate(of)
    ]
    for line in (x for x in lines if x["row"] == "SAM"):
        line["settings"] = {"rho": 0.2}
    lines.append({**lines[0], "row": "SAM (tuning)"})
    lines.append({**lines[0], "data": "another machine's", "val_loss": 99.0})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_page_has_paired_differences_and_counts_what_is_missing(tmp_path):
    losses = {ADAMW: [6.0, 6.5, 7.0], "SAM": [5.0, 5.51, 5.99], DECAY: [5.9, 6.6, 7.0], "SAM, on decay": [5.9, 6.6]}
    folder = written(tmp_path, losses | {"functional": [6.1]})
    study_report.write(tmp_path, tmp_path)
    text = (tmp_path / "study.md").read_text()
    # Student's t of 2 degrees of freedom is 4.303; the standard deviation of −1, −0.99, −1.01 is 0.01.
    assert (
        "| SAM | rho 0.2 | 2.00 | 5.500 | 5.000 | -1.000 ± 0.025, better | +0.000 ± 0.000, no difference | – |" in text
    )
    assert f"| {DECAY} |  | 1.00 | 6.500 | 6.000 | +0.000 ± 0.248, no difference | – | – |" in text
    assert "+0.100 (one seed)" in text
    assert f"| {REGIMES['scarce'].title} (unfinished) | none | SAM: -1.000 ± 0.025 | none | none |" in text
    regime = REGIMES["scarce"]
    total = sum(len(regime.seeds_of(entry.label)) for entry in entries(regime))
    assert total == regime.seeds * len(list(entries(regime))) + 2 * len(regime.leading)
    assert study_report.missing(folder, "scarce") == total - 12
    assert f"**{total - 12} of {total} runs are missing**" in text
    assert (folder / "scarce.png").stat().st_size > 1000


def test_a_late_phase_is_compared_by_what_comes_after(tmp_path):
    folder = written(tmp_path, {ADAMW: [6.0, 6.0], "SAM": [6.1, 6.1]}, "late")
    path = folder / "late.jsonl"
    # Fine-tuning at three rates: (loss on the new text, loss on the old one).
    tuned = {ADAMW: [[5.0, 6.2], [4.5, 6.6], [4.0, 7.5]], "SAM": [[4.9, 6.2], [4.3, 6.4], [4.0, 7.0]]}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    more = [{**x, "4 bits": x["val_loss"] + 0.2, "fine_tuning": tuned.get(x["row"], tuned[ADAMW])} for x in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in more))
    study_report.write(tmp_path, tmp_path)
    text = (tmp_path / "study.md").read_text()
    old = 6.2 + (4.9 - 4.5) / (4.9 - 4.3) * 0.2  # where it has learned as much as AdamW at its middle rate
    rounded = f"| {REGIMES['late'].title}, loss after rounding to 4 bits (unfinished) | none | none | none | – |"
    assert rounded in text
    assert f"| SAM | +0.100 ± 0.000, worse | {old - 6.6:+.3f} ± 0.000, better |" in text


@pytest.mark.slow
def test_a_signal_stops_it_and_the_run_under_way_leaves_a_checkpoint(tmp_path):
    process = spawn.start(Path(study.__file__), "--regimes", "scarce", "--out", tmp_path, "--results", tmp_path)
    until = time.time() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.time() < until:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=study.GRACE) == 130
    assert list(tmp_path.glob("runs/*/checkpoints/step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["late", "fine-tuning"])
def test_runs_that_start_from_a_base(name, tmp_path, monkeypatch):
    """In small: the base once a seed, each run from it, and what is looked at afterwards."""
    model = dataclasses.replace(study_plan.SMALLEST, layers=1, width=16, heads=2)
    late = {"data": "python", "max_tokens": 70_000, "late": 0.25, "steps": 40, "base": ("python", 70_000, 40)}
    changes = late if name == "late" else {"steps": 8, "base": ("python", 70_000, 16)}
    monkeypatch.setitem(REGIMES, name, dataclasses.replace(REGIMES[name], model=model, seeds=1, leading=(), **changes))
    monkeypatch.setattr(study_run, "FINE_TUNING_STEPS", 4)
    monkeypatch.setattr(study_run, "WINDOWS", 8)
    found = study_run.Runs(name, tmp_path / "runs", tmp_path / "done.jsonl")
    found.prepare()
    for label in (ADAMW, "SAM"):
        row = Row("sam", {"rho": 0.1}, "") if label == "SAM" else Row("adamw", {}, "")
        study.train_entry(found, Entry(label, row), {}, {}, math.inf)
    one, other = found.lines()
    assert one["val_loss"] != other["val_loss"]
    assert [path.name for path in (tmp_path / "runs" / "bases").iterdir()] == [f"{name}-0"]
    if name == "late":
        assert min(one["3 bits"], one["4 bits"], one["noise"], one["prose"], one["λmax"]) > 0
        assert one["λmax"] != other["λmax"]
        assert len(one["fine_tuning"]) == len(study_run.FINE_TUNING_RATES)
    else:
        assert one["old_loss"] > 0
