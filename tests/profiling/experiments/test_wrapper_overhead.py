"""The step under FSDP2 beside the same by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spawn

import wrapper_overhead


@pytest.mark.slow
def test_steps_are_compared_with_the_handwritten_one(tmp_path):
    out = tmp_path / "overhead.json"
    script = Path(wrapper_overhead.__file__)  # in a process of its own, since FSDP2 stays in one
    spawn.run(script, "--batch", 1, "--seq-len", 16, "--repeats", 10, "--json", out)
    content = json.loads(out.read_text())
    assert content["about"] == {"preset": "tiny", "ranks": 1, "repeats": 10}
    by_hand, *ours = content["rows"]
    assert [by_hand["step"], by_hand["ratio"]] == ["by hand", 1.0]
    assert [row["step"] for row in ours] == ["Step", "Step, fsam's AdamW"]
    assert all(row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] and row["step_ms"] > 0 for row in ours)


def test_too_few_repeats_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["wrapper_overhead", "--repeats", "3"])
    with pytest.raises(SystemExit, match="error: --repeats must be at least 10 for a median worth printing, got 3"):
        wrapper_overhead.main()
