"""The cost model and the profilers on the presets of images: what is predicted is what is counted."""

from __future__ import annotations

import json

import pytest

from fsam_core import cost
from fsam_profiling import flops
from fsam_profiling.settings import step_settings
from fsam_profiling.timing import variants
from fsam_profiling.timing.variants import Variant
from fsam_profiling.tpu import step_programs
from fsam_trainers.cost_table import counted, options_of
from fsam_trainers.models.vit_layout import ViTConfig

FUNCTIONAL = "precond-functional-sam"
CASES = {
    "adamw": ("adamw", {}),
    "exact": (FUNCTIONAL, {}),
    "quarter": (FUNCTIONAL, {"correction_fraction": 1 / 4}),
    "top": (FUNCTIONAL, {"scope": "top:1"}),
    "sam, split": ("precond-sam", {"form": "split", "ascent": "rest", "correction_fraction": 1 / 2}),
}


# JAX traces each case for seconds.
QUICK = {(name, "torch") for name in CASES} | {("top", "jax")}
EACH = [
    pytest.param(name, framework, marks=() if (name, framework) in QUICK else pytest.mark.slow)
    for name in CASES
    for framework in ("jax", "torch")
]


@pytest.mark.parametrize(("name", "framework"), EACH)
def test_predicted_operations_are_those_counted(name, framework):
    method, changes = CASES[name]
    chosen = step_settings("vit-tiny", method, batch=8, framework=framework, **changes)
    predicted = cost.estimate(counted(chosen.model, framework), options_of(chosen, "cpu"), chosen.tokens_per_step).flops
    if framework == "jax":
        found = flops.of_step(*step_programs.of(chosen))
    else:
        found = variants.flops(Variant(chosen), variants.make(Variant(chosen)))
    # A preset of ten classes: what XLA drops of the embedding of patches, which takes no gradient of its input, is 1 %.
    assert found == pytest.approx(predicted, rel=0.03)


def test_counts_are_those_of_the_model():
    c = ViTConfig(2, 16, 4, patch=4, height=8, image_width=8, channels=3, classes=7)
    found = counted(c, "torch")
    assert found.parameters == c.parameters
    # Four patches of 48 values, and four tokens in blocks of 12 D² weights.
    assert found.trunk_flops == 2 * 4 * (48 * 16 + 2 * 12 * 16**2)
    assert found.head_flops == 2 * 16 * 7
    assert found.perturbed("top:1") == pytest.approx(12 * 16**2 + 2 * 48 * 16 / 4 + 16 * 7, rel=0.15)


def test_the_exact_method_is_near_twice_adamw_and_a_part_is_cheap():
    """The head of an image is one row: nothing is gained at it."""
    chosen = step_settings("vit-b16", FUNCTIONAL, framework="jax")
    model = counted(chosen.model, "jax")
    ratio = lambda **changes: cost.estimate(model, cost.Options(framework="jax", **changes), 1024).flops_ratio
    assert ratio() == pytest.approx(2, abs=0.001)
    assert ratio(cut="hidden") == pytest.approx(2, abs=0.001)
    assert ratio(fraction=1 / 8) == pytest.approx(1.125, abs=0.001)
    assert ratio(scope="top:6") == pytest.approx(1.5, abs=0.01)
    assert ratio(path="sam", form="split", ascent="rest", fraction=1 / 2) == pytest.approx(1, abs=0.001)


def test_cost_says_images(capsys):
    from small_runs import fsam

    assert fsam("cost", "--preset", "vit-s16", "--budget", 1.2) == 0
    assert "22M parameters, 1,024 images a step" in capsys.readouterr().out
    assert fsam("cost", "--preset", "vit-s16", "--seq-len", 8) == 2


@pytest.mark.slow
def test_profile_step_times_a_preset_of_images(tmp_path, capsys):
    from small_runs import fsam

    path = tmp_path / "rows.json"
    options = ("--preset", "vit-tiny", "--batch", 4, "--repeats", 10, "--only", "adamw,1/4", "--json", path)
    assert fsam("profile", "step", *options) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["framework"] for row in rows} == {"jax", "torch"}
    assert {"textbook", "optax.contrib"} <= {row["saving"] for row in rows}
    assert all(row["tokens"] == 4 for row in rows)
