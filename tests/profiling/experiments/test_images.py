"""The page on images says what the comparisons found, and names no difference that the seeds do not show."""

from __future__ import annotations

import json

import numpy as np
import pytest

import images_report

METHODS = {"AdamW": "adamw:learning-rate=0.001", "SAM": "sam:rho=0.1", "split": "precond-sam:rho=0.1:form=split"}
LOSSES = {"AdamW": [0.50, 0.60, 0.70], "SAM": [0.41, 0.50, 0.61], "split": [0.58, 0.61, 0.62]}


def compared(budget: str) -> dict:
    rows = [
        {"method": METHODS[name], "steps": 300, "val_losses": losses, "val_accuracies": [1 - x / 10 for x in losses]}
        for name, losses in LOSSES.items()
    ]
    return {
        "title": f"10 parameters, torch/torch on cpu, equal {budget}",
        "data": {"description": "digits: 9 images"},
        "command": f"fsam compare --budget {budget}",
        "seeds": 3,
        "rows": rows,
    }


def test_the_page_has_means_and_paired_differences(tmp_path):
    both = {budget: compared(budget) for budget in ("steps", "flops")}
    images_report.write("digits", both, METHODS, {"tried": []}, tmp_path)
    page = (tmp_path / "images.md").read_text()
    assert page.count("| AdamW | 300 | 0.6000 |  | 94.00 % |  |") == 2
    assert page.count("| SAM | 300 | 0.5067 | -0.0933 ± 0.0143 | 94.93 % | +0.93 ± 0.14 |") == 2
    assert page.count("| split | 300 | 0.6033 | – (+0.0033 ± ") == 2
    assert "Tuned values: AdamW learning-rate=0.001, SAM rho=0.1" in page
    assert (tmp_path / "images-digits.png").stat().st_size > 5000
    facts = json.loads((tmp_path / "images-digits.json").read_text())
    assert facts["rows"]["steps"]["SAM"]["loss_difference"][0] == pytest.approx(-0.28 / 3)


def test_the_interval_is_students():
    # For differences −1, 0, 4: mean 1, standard deviation sqrt(7), t(0.975, 2) = 4.3027.
    mean, half = images_report.difference([0, 1, 5], [1, 1, 1])
    assert (mean, half) == (1, pytest.approx(4.3027 * np.sqrt(7 / 3), rel=1e-4))
    assert images_report.difference([1.0], [0.0]) == (1, np.inf)
