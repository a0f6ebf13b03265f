"""The examples run, learn, and are short."""

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SLOW = ("hf_fine_tuning", "jax_mesh", "nanogpt")  # several seconds each
SCRIPTS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
    for path in sorted(FOLDER.glob("*.py"))
]


def losses(printed: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss ([\d.]+)", printed)]


@pytest.mark.parametrize("path", SCRIPTS)
def test_an_example_learns(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    found = losses(capsys.readouterr().out)
    assert found[-1] < 0.6 * found[0]


@pytest.mark.slow
def test_notebook_draws_the_landscape(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads((FOLDER / "landscape.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert max(losses(printed)) < 1.5  # untrained: 4.9
    assert len(names["figure"].axes) == 2
    sharpest = [float(x) for x in re.findall(r"eigenvalues ([\d.]+)", printed)]
    assert sharpest[1] < sharpest[0]  # Functional-SAM ends flatter than AdamW


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_an_example_is_short(path):
    lines = path.read_text().splitlines()
    if path.suffix == ".ipynb":
        lines = [line for cell in json.loads(path.read_text())["cells"] for line in cell["source"]]
    assert len(lines) < 80
