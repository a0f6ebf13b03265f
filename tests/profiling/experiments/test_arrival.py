"""All of the perturbation arrives in float32 and from masters; in-place bfloat16 loses it."""

from __future__ import annotations

import json
import math

import pytest

import arrival
from fsam_kernels.shapes import WEIGHTS


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def check(shapes, rhos) -> None:
    found = {(row["rho"], row["way"]): row for row in arrival.measure(shapes, rhos)}
    for rho in rhos:
        float32, nearest, drawn, _ = (found[rho, way] for way in arrival.WAYS)
        assert abs(float32["projection"] - 1) < 0.001
        assert abs(nearest["projection"] - 1) < 0.02
        # With stochastic rounding the noise along ε is proportional to the length of what is written.
        assert abs(drawn["projection"] - 1) < max(0.02, 3 * drawn["length"] / math.sqrt(count(shapes)))
    # The negative control: anything below half a unit in the last place of a weight is lost.
    assert found[min(rhos), "bfloat16 in place"]["projection"] < 0.5


@pytest.mark.parametrize("model", ["24m", "118m"])
def test_perturbation_arrives_in_some_tensors(model):
    """Embedding rows, a layer norm, part of a projection; ρ is such that a weight moves as in the whole model."""
    features = WEIGHTS[model][0][1]
    shapes = [(400, features), (features,), (features, 400)]
    share = math.sqrt(count(shapes) / count(WEIGHTS[model]))
    check(shapes, [0.05 * share, 0.5 * share])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["24m", "118m"])
def test_perturbation_arrives_in_all_tensors(model):
    check(WEIGHTS[model], [0.05, 0.1, 0.2, 0.5])


def test_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WEIGHTS, "small", [(30, 40), (40,)])
    path = tmp_path / "arrival.json"
    monkeypatch.setattr("sys.argv", ["arrival", "--model", "small", "--rho", "0.01", "--json", str(path)])
    arrival.main()
    written = json.loads(path.read_text())
    assert written["command"] == f"python profiling/experiments/arrival.py --model small --rho 0.01 --json {path}"
    rows = written["rows"]
    out = capsys.readouterr().out
    assert [row["way"] for row in rows] == list(arrival.WAYS)
    assert f"{rows[0]['projection']:.4f}" in out
    monkeypatch.setattr("sys.argv", ["arrival", "--model", "huge"])
    with pytest.raises(SystemExit, match="arrival: error: --model: 'huge' is not known; use 24m"):
        arrival.main()
