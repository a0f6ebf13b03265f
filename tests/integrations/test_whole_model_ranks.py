"""Two ranks: the whole model inside DistributedDataParallel, FSDP2, Accelerate and the Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spawn

SCRIPT = Path(__file__).with_name("whole_model_ranks.py")
CASES = ("ddp", "fsdp", "accelerate", "trainer")


@pytest.fixture(scope="module")
def found():
    process = spawn.torchrun(2, SCRIPT, *CASES, env={"OMP_NUM_THREADS": "1"})
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return json.loads(text.partition("FOUND ")[2].splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_one_process_with_the_whole_batch(found, case):
    assert isinstance(found[case], float), found[case]
    assert found[case] < 1e-5
