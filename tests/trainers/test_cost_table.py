"""`fsam cost`: what it counts of the trainers' models, what it prints, what it says to bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from fsam_core import UserError, cost
from fsam_trainers import cost_table, machine_probe
from fsam_trainers.cli.cost import figures, run
from fsam_trainers.cli.cost_options import CostOptions
from fsam_trainers.config import SAVINGS, Settings
from fsam_trainers.cost_table import TABLE_ROWS, counted
from fsam_trainers.presets import PRESETS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_counted_to_the_last_parameter(name, framework, tied):
    config = PRESETS[name].model(tied=tied, dropout=0.0)
    model = counted(config, framework)
    assert model.parameters == config.parameters
    matrices = config.non_embedding_parameters - (2 * config.layers + 1) * config.width
    assert model.trunk_flops == 2 * matrices
    assert model.perturbed("norms") == (2 * config.layers + 1) * config.width
    assert model.perturbed("no-head") == config.parameters - config.width * config.vocab_size


@pytest.mark.parametrize("more", [{"every_saving": True}, {"budget": 1.5, "spare": True}])
def test_every_row_is_a_run(more):
    """Four sequences are not cut at 1/8 or 1/16."""
    settings = Settings("jax", "precond-functional-sam", PRESETS["24m"].model(tied=True, dropout=0.0), 10, 4)
    rows = cost_table.figures(settings, "24m", "v5e", **more)["rows"]
    named = [re.search(r"(?:fraction|split) 1/(\d+)", row["name"]) for row in rows]
    assert {int(found[1]) for found in named if found} == {2, 4}


def test_one_method_has_its_regions_and_its_memory(tmp_path, capsys):
    file = tmp_path / "cost.json"
    assert run(CostOptions(preset="24m", correction_fraction=1 / 8, cut="hidden", devices=8, json=file)) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert 1.05 < row["flops_ratio"] < 1.12
    assert row["options"]["fraction"] == 1 / 8
    assert math.fsum(x["seconds"] for x in row["regions"].values()) == pytest.approx(row["seconds"])
    assert row["collectives"]["gradients"] == 3
    for text in ("24m, 43M parameters", "base forward", "perturb", "kept cotangent", f"{row['time_ratio']:.3f}"):
        assert text in printed


def test_all_has_a_row_for_every_saving_the_method_allows():
    rows = figures(CostOptions(all=True))["rows"]
    assert [row["name"] for row in rows] == [name for name, _ in TABLE_ROWS]
    ratios = {row["name"]: row["flops_ratio"] for row in rows}
    assert (ratios["AdamW"], ratios["SAM"]) == (1, 2)
    assert ratios["fraction 1/8, cut hidden"] < ratios["fraction 1/8"] < ratios["fraction 1/4"]
    left_out = {"cut hidden", "fraction 1/8, cut hidden"}
    of_sam = {row["name"] for row in figures(CostOptions(all=True, method="sam"))["rows"]}
    assert of_sam == set(ratios) - left_out


def test_a_budget_lists_what_fits_cheapest_first():
    found = figures(CostOptions(preset="24m", budget=1.15))
    ratios = [row["time_ratio"] for row in found["rows"]]
    assert ratios == sorted(ratios)
    assert all(1 < x <= 1.15 for x in ratios)
    assert "fraction 1/8" in {row["name"] for row in found["rows"]}
    more = figures(CostOptions(preset="24m", budget=1.15, spare=True))["rows"]
    assert {row["name"] for row in found["rows"]} < {row["name"] for row in more}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"correction_fraction": 1 / 4}, {"fraction": 1 / 4}),
        ({"savings": "cheap"}, {"fraction": 1 / 8, "cut": "hidden"}),
        ({"correction_fraction": 1.0, "cut": "logits"}, {"fraction": 1, "cut": "logits"}),  # as without, but asked for
        ({"every": 4, "scope": "all"}, {"every": 4, "start": 0, "scope": "all"}),
        ({"ascent": "part", "ascent_fraction": 1 / 4}, {"ascent": "part", "ascent_fraction": 1 / 4}),
    ],
)
def test_a_budget_keeps_the_options_given(given, kept):
    rows = figures(CostOptions(preset="24m", budget=1.5, spare=True, **given))["rows"]
    assert len(rows) > 1
    assert all(row["options"][name] == value for row in rows for name, value in kept.items())
    assert len({row["name"] for row in rows}) == len(rows)
    if "savings" in given:
        assert "fraction 1/8, cut hidden" in {row["name"] for row in rows}


def test_a_budget_counts_a_row_as_all_rows_do():
    every = {row["name"]: row for row in figures(CostOptions(all=True))["rows"]}
    within = {row["name"]: row for row in figures(CostOptions(budget=1.3, spare=True))["rows"]}
    for name in ("fraction 1/4", "fraction 1/8", "fraction 1/8, cut hidden"):
        for what in ("flops_ratio", "time_ratio", "peak_bytes", "study"):
            assert within[name][what] == every[name][what], (name, what)


def test_what_does_not_fit_the_card_is_marked(capsys):
    assert run(CostOptions(all=True)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+ of \d+ rows, marked \*, do not fit into the 80 GB of a h100", printed)
    found = figures(CostOptions(all=True))["rows"]
    assert {row["fits"] for row in found} == {True, False}
    assert all(row["fits"] == (row["peak_bytes"] <= 80e9) for row in found)
    assert run(CostOptions(devices=8)) == 0
    assert "not fit" not in capsys.readouterr().out
    (row,) = figures(CostOptions(preset="tiny", machine="v5e"))["rows"]
    assert row["fits"]


def test_quality_is_that_of_the_study():
    rows = {row["name"]: row["study"] for row in figures(CostOptions(all=True))["rows"]}
    assert rows["AdamW"] is None
    assert rows["the method, exact"] < 0
    assert {row["study"] for row in figures(CostOptions(all=True, method="sam"))["rows"]} == {None}
    # The rows are those options on top of the ones that are given, and what was not trained has no loss.
    previous = {row["name"]: row["study"] for row in figures(CostOptions(all=True, ascent="previous"))["rows"]}
    found = {name: x for name, x in previous.items() if x is not None}
    own = [name for name in rows if re.search("split|ascent", name) and name in found]
    assert len(own) == 7
    assert found == {name: rows[name] for name in own}  # those that say themselves which ascent they take
    assert {row["study"] for row in figures(CostOptions(budget=1.3, ascent="previous", start=0.5))["rows"]} == {None}


def test_savings_by_name_are_the_trainers():
    assert {name: dict(one) for name, one in cost.PRESETS.items()} == {
        name: {k.removeprefix("correction_"): x for k, x in one.items()} for name, one in SAVINGS.items()
    }
    for name in cost.PRESETS:
        assert figures(CostOptions(savings=name))["rows"][0]["flops_ratio"] == pytest.approx(
            figures(CostOptions(**_as_options(name)))["rows"][0]["flops_ratio"]
        )


def _as_options(name: str) -> dict:
    fraction = {"balanced": 1 / 4, "cheap": 1 / 8, "split": 1 / 2}.get(name)
    split = {"form": "split", "ascent": "rest"} if name == "split" else {}
    return {"correction_fraction": fraction, "cut": "hidden" if name == "cheap" else "logits", **split}


def test_a_run_of_the_trainers_as_options():
    model = PRESETS["tiny"].model(tied=True, dropout=0.0)
    settings = Settings("torch", "sam", model, 100, 16, micro_batches=2, correction_fraction=0.5, every=4, start=0.25)
    o = cost_table.options_of(settings, "cpu")
    assert (o.path, o.fraction, o.every, o.start, o.micro_batches, o.framework) == ("sam", 0.5, 4, 0.25, 2, "torch")
    assert o.cotangent == "keep"
    large = dataclasses.replace(settings, model=PRESETS["24m"].model(tied=True, dropout=0.0), batch=256)
    assert cost_table.options_of(large, "cpu").cotangent == "recompute"  # 8 GiB of logits
    assert cost_table.options_of(dataclasses.replace(large, correction_fraction=1 / 256), "cpu").cotangent == "keep"
    assert cost_table.options_of(dataclasses.replace(settings, method="adamw"), "cpu").path == "base"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_machine_at_hand(framework, monkeypatch):
    for name, small in (("LARGE", 2**20), ("NORMALS", 2**14), ("REPEATS", 2), ("ROWS", 64)):
        monkeypatch.setattr(machine_probe, name, small)
    found = figures(CostOptions(preset="tiny", machine="here", framework=framework, batch=2))
    rates = [x for name, x in found["machine"].items() if name != "name" and x is not None]
    assert len(rates) == 7
    assert all(0 < x < math.inf for x in rates)
    assert 1 < found["rows"][0]["time_ratio"] < 4
    assert framework in found["machine"]["name"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "3b"}, "--preset: '3b' is not known"),
        ({"method": "lion"}, "--method: 'lion' is not known"),
        ({"machine": "abacus"}, "--machine: 'abacus' is not known; use one of here, a100, h100"),
        ({"framework": "mxnet"}, "--framework must be jax or torch, got 'mxnet'"),
        ({"savings": "free"}, "--savings: 'free' is not known"),
        ({"correction_fraction": "some"}, r"--correction-fraction must be in \(0, 1\], 1/8 say, got 'some'"),
        ({"correction_fraction": 9 / 8}, r"--correction-fraction must be in \(0, 1\], 1/8 say, got 1.125"),
        ({"ascent_fraction": "1/0"}, r"--ascent-fraction must be a number in \(0, 1\], 1/8 say, got '1/0'"),
        ({"cotangent": "lose"}, "--cotangent must be auto, keep or recompute, got 'lose'"),
        ({"scope": "top:7"}, "--scope must be at most top:6"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"preset": "vit-tiny", "vocab_size": 0}, "a classifier needs at least two classes, got 0"),
        ({"devices": 3}, "--devices must be a number that divides --batch 256, got 3"),
        ({"micro_batches": 3}, "--micro-batches must be a number that divides --batch 256"),
        ({"budget": 0.9}, "--budget must be at least 1, .* got 0.9"),
        ({"budget": 1.2, "method": "adamw"}, "--budget must be .* for a method with a correction"),
        ({"machine": "here", "dtype": "bfloat16"}, "--dtype: rates are measured here in float32, got 'bfloat16'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        figures(CostOptions(**options))
