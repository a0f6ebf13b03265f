"""The step under FSDP2 beside the same by hand, in a process of its own, since it makes a process group."""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = [sys.executable, "-m", "wrapper_overhead", "--batch", "1"]


def test_the_steps_do_the_same_work_and_are_set_against_the_one_by_hand(tmp_path):
    out = tmp_path / "overhead.json"
    done = subprocess.run(
        [*COMMAND, "--repeats", "10", "--json", str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["about"] == {"preset": "tiny", "ranks": 1, "repeats": 10}
    by_hand, *ours = content["rows"]
    assert [by_hand["step"], by_hand["ratio"]] == ["by hand", 1.0]
    assert [row["step"] for row in ours] == ["Step", "Step, fsam's AdamW"]
    assert all(row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] and row["step_ms"] > 0 for row in ours)


def test_too_few_repeats_are_refused_in_one_sentence():
    done = subprocess.run([*COMMAND, "--repeats", "3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("--repeats must be at least 10 for a median worth printing, got 3")
