"""Every kind of report fits a phone and a desk: nothing is cut off, and nothing scrolls to the side."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import browser
import pytest

import study_report
from fsam_profiling import report, results
from fsam_profiling.sharpness import report as sharpness
from fsam_trainers import page
from fsam_trainers.cli.compare import Compare
from fsam_trainers.cli.options import parse
from fsam_trainers.compare import COLUMNS, _next
from fsam_trainers.report import write_plot, write_report

DATA = Path(__file__).parent.parent.parent / "docs" / "data"
METHODS = ("adamw", "precond-functional-sam", "precond-functional-sam:correction-fraction=1/4:learning-rate=0.003")
TEXTS = {"prompt": "import os", "before training": "<b>&" + "x" * 300, "adamw": "\ndef main():"}
FILES = ("step-24m-jax", "tpu-step-v6e-24m", "scale-tpu-118m")  # 8, 22 and 6 columns


def lines(seed: int, gain: float) -> list[dict]:
    """A run's metrics: 40 steps, evaluated at each tenth, its correction measured at each twentieth."""
    found = []
    for step in range(1, 41):
        loss = 3 + 5 * math.exp(-step / 10) - gain + 0.01 * seed
        line = {"step": step, "loss": loss, "grad_norm": 1 + 1 / step, "seconds": step, "step_ms": 100}
        found.append(line | ({"correction_ratio": 0.3} if step % 20 == 0 and gain else {}))
        if step % 10 == 0:
            found.append({"step": step, "seconds": step, "val_loss": loss + 0.1})
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The folder of a comparison's plot and report."""
    out = tmp_path_factory.mktemp("compare")
    curves = {name: [lines(seed, 0.1 * i) for seed in range(3)] for i, name in enumerate(METHODS)}
    cells = ["5.9600 ± 0.0123", "-0.0200", "5.9000 (490)", "1.58 (1.51–1.66)", "5.9", "4.9", "700", "95", "75.1", ""]
    rows = [
        {"method": name, "val_loss_mean": 6.0 - i, "cost": {"step_ms": 90.0 + i}, "cells": [name, *cells]}
        for i, name in enumerate(METHODS)
    ]
    comparison = {
        "title": "1,342,592 parameters, jax/xla on cpu, equal steps",
        "columns": COLUMNS,
        "rows": rows,
        "command": f"fsam compare --methods {','.join(METHODS)}",
        "changed": {"steps": 700, "weight_decay": 0.3},
        "data": {"description": "python", "fingerprint": "ab" * 32},
        "notes": ["Validation loss at the end"],
        "next": [("what became flatter", "fsam sharpness runs/train/adamw-seed0")],
    }
    write_plot(out / "plot.png", curves, {row["method"]: 90.0 for row in rows})
    write_report(out / "report.html", comparison, curves, TEXTS)
    return out


def test_comparison_has_its_pictures_and_texts(compared):
    shown = (compared / "report.html").read_text()
    assert shown.count("<svg") == 4  # against time and steps, gradient, correction
    assert "options that are not the preset&#39;s</dt><dd>steps 700, weight-decay 0.3" in shown
    assert "&lt;b&gt;&amp;x" in shown
    assert "fsam sharpness runs/train/adamw-seed0" in shown
    assert "skipped" not in shown  # an empty column
    assert (compared / "plot.png").stat().st_size > 10_000


def test_suggestions_keep_the_options_of_the_comparison(tmp_path):
    command = f"fsam compare --methods {','.join(METHODS)} --batch 8 --out {tmp_path} --cost-steps=10"
    rows = [{"method": name, "val_loss_mean": 5.0 - i} for i, name in enumerate(METHODS)]
    settings = parse(Compare, ["--batch", "8"], "fsam compare").settings()
    comparison = {"rows": rows, "seeds": 1, "budget": "steps", "command": command}
    found = dict(_next(comparison, settings, tmp_path, of_branches=False))
    tune = "fsam tune --method precond-functional-sam --batch 8 --correction-fraction 1/4"
    assert found["the best learning rate and ρ, AdamW's too"] == tune
    assert found["all methods for the same time"].endswith(f"--cost-steps=10 --budget time --out {tmp_path}-time")
    best = tmp_path / "precond-functional-sam_correction-fraction1-4_learning-rate0.003-seed0"
    assert found["what the best model writes"] == f"fsam sample {best}"


def sharpness_page() -> str:
    """A page of `fsam sharpness` with all of its pictures."""
    same = {"run": "runs/compare-jax-tiny/precond-functional-sam-seed0", "step": 100, "matrix": "H"}
    shares = [
        same | {"what": "shares", "direction": d, "radius": r, "gauss_newton": 0.1, "functional": 0.2, "cross": 0.7}
        | {"cosine": 0.5, "loss": 5.9}
        for d in ("gradient", "adam") for r in (0.0, 0.2)
    ]  # fmt: skip
    spectrum = same | {"what": "spectrum", "eigenvalues": [9.0, 3.0], "smallest": -1.0, "converged": True}
    density = same | {"what": "density", "values": [-1.0, 0.0, 9.0], "weights": [0.1, 0.8, 0.1]}
    line = same | {"what": "line", "direction": "gradient", "distances": [-1, 0, 1], "losses": [2, 1, 2]}
    plane = same | {"what": "plane", "distances": [-1, 0, 1], "losses": [[3, 2, 3], [2, 1, 2], [3, 2, 3]]}
    rows = [*shares, spectrum, density, line, plane]
    return page.render("fsam sharpness", sharpness.sections(rows, "fsam sharpness a", {"data": "python"}))


@pytest.mark.skipif(browser.browser() is None, reason="no Chromium is installed: apt-get install chromium")
def test_no_report_overflows_a_phone_or_a_desk(compared, tmp_path):
    files = [results.read(DATA / f"{name}.json") for name in FILES]
    shutil.copytree(DATA.parent / "results" / "study", tmp_path / "study")
    study_report.write(tmp_path, tmp_path)
    pages = [
        (compared / "report.html").read_text(),
        (tmp_path / "study.html").read_text(),
        page.render("fsam profile", [report.section(file) for file in files]),
        sharpness_page(),
    ]
    found = browser.overflowing(pages, (390, 1280), tmp_path)
    assert len(found) == 8
    for one in found:
        assert one["scroll"] <= one["width"], one
        assert one["wrong"] == []


@pytest.mark.skipif(browser.browser() is None, reason="no Chromium is installed: apt-get install chromium")
def test_what_overflows_is_found(tmp_path):
    wide = '<body style="margin:0"><pre>' + "x" * 300 + "</pre></body>"
    cut = '<body style="margin:0"><div style="overflow-x:auto"><p style="width:500px">x</p></div></body>'
    first, second = browser.overflowing([wide, cut], (390,), tmp_path)
    assert first["scroll"] > 390
    assert [x.split()[0] for x in second["wrong"]] == ["DIV", "P"]
