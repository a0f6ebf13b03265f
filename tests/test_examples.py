"""The examples run, and learn."""

import re
from pathlib import Path

import pytest
import spawn

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_learns(path):
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", spawn.run(path).stdout)]
    assert losses[-1] < 0.6 * losses[0]
