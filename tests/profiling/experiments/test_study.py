"""The study's plan, and its page, plots and figures from invented results."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console as Rich

import study
import study_report
from fsam_core.errors import UserError
from study import BEST_RIVAL, RIVALS, SAME_TIME, VARIANTS, Study

TUNED = {"learning_rate": 1e-3, "weight_decay": 1.0, "dropout": 0.1, "rho": 0.2, "sam_rho": 0.05}
TUNED |= {"rival": {"weight_decay": 1.0}, "rival_row": RIVALS[0], "swept": {"rate": {"0.001": 6.5, "0.002": 6.75}}}


def results(tmp_path, regime="many passes", offset=None, complete=True, without=""):
    """A study's folder with invented losses: seed s of row i ends at 6 + s − offset, its best is 0.5 less."""
    plan = Study(out=tmp_path, seeds=2)
    rows = {}
    labels = [label for label, _ in study._plan(plan, regime, TUNED)]
    labels += [label for label, _ in study._on_the_best_rival(plan, TUNED)]
    labels += [f"{name} | {SAME_TIME}" for name in study.EQUAL_TIME]
    for label in (label for label in labels if not without or without not in label):
        end = 6 - (offset or {}).get(label, 0)
        of = lambda s, end=end: {"val_loss": end + s, "best_val_loss": end + s - 0.5, "best_step": 80, "steps": 160}
        curve = {"curve": [[16, 7.0], [160, end]], "skipped_steps": 0, "data": {"description": "text"}}
        rows[label] = [{**of(s), **curve} for s in range(2)]
    cost = {"step_ms": 100.0, "ratio": 1.5, "ratio_p20": 1.4, "ratio_p80": 1.6}
    found = {
        "study": {**dataclasses.asdict(plan), "out": "out", "done": "done"},
        "complete": complete,
        "costs": dict.fromkeys(VARIANTS, 1.5),
    }
    found["regimes"] = {regime: {"tuned": TUNED, "rows": rows}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    (tmp_path / "costs.json").write_text(json.dumps(dict.fromkeys(VARIANTS, cost)))
    compared = [{"step": i, "variant": "SAM", "cosine": i / 4, "length": 2.0, "exact_to_gradient": 0.1} for i in (1, 2)]
    (tmp_path / "cosines.json").write_text(json.dumps({"every": 1, "regime": regime, "rows": compared}))


def test_every_row_is_compared_with_adamw_of_its_seed(tmp_path):
    gain = {"exact": 0.125, f"exact | {SAME_TIME}": -0.25, f"exact | {BEST_RIVAL}": 0.5, RIVALS[0]: 0.375}
    results(tmp_path, offset=gain)
    study_report.write(study_report.StudyReportOptions(tmp_path, tmp_path / "out"))
    text = (tmp_path / "out" / "study.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| exact |")]
    same = lambda x: f"{x:+.3f} ({x:+.3f} … {x:+.3f})"
    cells = ["exact", "1.50 (1.40–1.60)", "6.375", same(-0.125), "5.875 (80)", same(0.25), same(-0.125)]
    assert row == f"| {' | '.join(cells)} |"
    assert "| SAM | 0.38 (0.25 … 0.50) | 2.00 (2.00 … 2.00) |" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "study.md", "study.json", "study-losses.png", "study-curves.png", "study-cosines.png"
    }  # fmt: skip


def test_unfinished_study_says_so(tmp_path):
    with pytest.raises(UserError, match=r"results.json is not there; python profiling/experiments/study.py makes it"):
        study_report.gathered(tmp_path)
    results(tmp_path, complete=False, without=SAME_TIME)
    study_report.write(study_report.StudyReportOptions(tmp_path, tmp_path / "out"))
    text = (tmp_path / "out" / "study.md").read_text()
    assert "Not all of the plan is trained yet" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| exact |")]
    assert row.split(" | ")[5] == "–"


def test_equal_rows_share_a_run(tmp_path):
    plan = Study(out=tmp_path)
    rows = dict(study._plan(plan, "many passes", {**TUNED, "weight_decay": 1e-4, "rival": {"dropout": 0.1}}))
    files = lambda label: [study.key(plan, run) for run in rows[label]]
    assert files("AdamW") == files("AdamW, weight decay")  # the best decay is AdamW's default
    assert not set(files("AdamW")) & set(files("AdamW, dropout"))
    assert files("exact") != files("hidden cut")
    assert len(set(files("exact"))) == plan.seeds


def test_sweep_extends_while_its_end_is_best(tmp_path, monkeypatch):
    tried = []

    def trained(plan, runs, rich):
        """Least at a rate of 1e-4; all else alike."""
        tried.append(len(runs))
        return {run.name: {"val_loss": abs(run.settings.learning_rate - 1e-4)} for run in runs}

    monkeypatch.setattr(study, "_all", trained)
    found = study._tune(Study(out=tmp_path), "one pass", Rich(quiet=True))
    assert found["learning_rate"] == pytest.approx(1.25e-4)
    assert tried[:4] == [4, 5, 6, 7]


def test_finished_run_is_not_repeated(tmp_path, monkeypatch):
    plan = Study(out=tmp_path, done=tmp_path / "runs.jsonl", jobs=2)
    runs = [
        study._run(plan, "one pass", f"rate {x}", study.settings_of(plan, "AdamW", learning_rate=x)) for x in (1, 2)
    ]
    trained = []

    def train(plan, run):
        trained.append(run.name)
        return {"val_loss": run.settings.learning_rate}

    monkeypatch.setattr(study, "_train", train)
    first = study._all(plan, runs[:1] * 2, Rich(quiet=True))
    assert trained == [runs[0].name]
    both = study._all(plan, runs, Rich(quiet=True))
    assert trained == [run.name for run in runs]
    assert both[runs[0].name]["val_loss"] == first[runs[0].name]["val_loss"] == 1
