"""The cost model is what arithmetic says; `test_cost_counted` has its operations."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from fsam_core import UserError, cost
from fsam_core.cost import Machine, Options

# --- the design's table -----------------------------------------------------------------------------------------------

SIZES = {"layers": 4, "width": 256, "mlp": 1024, "heads": 4, "seq_len": 128, "vocabulary": 16384}
MODEL = dataclasses.replace(cost.decoder(**SIZES), attention_flops=0)
TOKENS = 4096
H = MODEL.head_flops / (MODEL.head_flops + MODEL.trunk_flops)  # the head's share of a forward pass


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({"path": "base"}, 1),
        ({"path": "sam"}, 2),
        ({}, 2),
        ({"cotangent": "keep"}, 2 - H / 3),
        ({"cut": "hidden"}, 2 - H),
        ({"fraction": 1 / 8, "cotangent": "keep"}, 1 + (1 - H / 3) / 8),
        ({"fraction": 1 / 8, "cut": "hidden"}, 1 + (1 - H) / 8),
        ({"ascent": "previous", "cotangent": "keep"}, (4 - H) / 3),
        ({"path": "sam", "ascent": "momentum"}, 1),
        ({"scope": "top:2", "cotangent": "keep"}, 1 + (1 - H) / 2 + H * 2 / 3),
        ({"every": 4}, 1.25),
        ({"start": 0.9}, 1.1),
        ({"probability": 0.3}, 1.3),
        ({"every": 2, "start": 0.5, "fraction": 1 / 4, "cut": "hidden"}, 1 + (1 - H) / 16),
    ],
)
def test_operations_are_those_of_the_design(changes, ratio):
    assert cost.estimate(MODEL, Options(**changes), TOKENS).flops_ratio == pytest.approx(ratio, rel=1e-12)


def test_checkpointing_adds_one_forward_of_the_blocks():
    plain, again = (cost.estimate(MODEL, Options(remat=x), TOKENS) for x in (False, True))
    forward = TOKENS * MODEL.trunk_flops
    assert again.adamw.flops - plain.adamw.flops == pytest.approx(forward)
    assert again.flops - plain.flops == pytest.approx(2 * forward)
    assert again.peak_bytes < plain.peak_bytes


# --- bytes, memory, collectives ---------------------------------------------------------------------------------------


def test_parameter_work_is_what_each_pass_reads_and_writes():
    P = MODEL.parameters
    found = cost.estimate(MODEL, Options(), TOKENS).steps["corrected"].regions
    assert found["update"].bytes == (4 + 28) * P
    assert found["norm"].bytes == (4 + 8) * P
    assert found["perturb"].bytes == 16 * P
    plain = cost.estimate(MODEL, Options(precondition=None), TOKENS).steps["corrected"].regions
    assert (plain["norm"].bytes, plain["perturb"].bytes) == (8 * P, 12 * P)
    some = cost.estimate(MODEL, Options(scope="norms"), TOKENS).steps["corrected"].regions
    assert some["perturb"].bytes == 16 * (2 * 4 + 1) * 256
    drawn = cost.estimate(MODEL, Options(ascent="random"), TOKENS).steps["corrected"]
    assert drawn.work.normals == P


def test_part_holds_one_more_gradient_and_exact_none():
    P4 = 4 * MODEL.parameters
    exact, part = (cost.estimate(MODEL, Options(fraction=q), TOKENS).steps["corrected"].memory for q in (1, 0.5))
    assert "gradient of B" not in exact
    assert "gradient of S" not in exact
    assert P4 in (part.get("gradient of B"), part.get("gradient of S"))
    for one in ({"ascent": "previous"}, {"every": 2, "between": "reuse"}):
        assert cost.estimate(MODEL, Options(**one), TOKENS).steps["corrected"].memory["carried from step to step"] == P4


def test_a_kept_cotangent_is_the_logits_of_the_part():
    memory = lambda **changes: (
        cost.estimate(MODEL, Options(**changes), TOKENS).steps["corrected"].memory["kept cotangent"]
    )
    V, D = MODEL.vocabulary, MODEL.width
    assert memory(cotangent="keep") == TOKENS * (4 * V + 20)
    assert memory() == TOKENS * (4 * D + 20)
    assert memory(cotangent="keep", fraction=1 / 8) == TOKENS / 8 * (4 * V + 20)
    assert memory(cotangent="keep", dtype="bfloat16") == TOKENS * (2 * V + 20)
    assert memory(cut="hidden") == TOKENS * 4 * D + 4 * V * D


def test_micro_batches_divide_activations_and_add_a_gradient():
    whole, parts = (cost.estimate(MODEL, Options(path="base", micro_batches=m), TOKENS).adamw.memory for m in (1, 4))
    assert parts["activations"] == whole["activations"] / 4
    assert parts["gradient"] >= 4 * MODEL.parameters


def test_collectives_of_data_parallel_steps():
    P4 = 4 * MODEL.parameters
    of = lambda **changes: cost.estimate(MODEL, Options(devices=8, **changes), TOKENS).collectives
    assert of(path="base") == (1, P4, 1)
    assert of() == (2, 2 * P4, 3)
    assert of(fraction=1 / 8) == (3, 3 * P4, 3)
    assert of(ascent="momentum") == (1, P4, 3)
    assert of(ascent="micro", path="sam") == (1, P4, 3)
    assert of(every=4) == pytest.approx((1.25, 1.25 * P4, 1.5))
    assert of(scope="norms") == (2, P4 + 4 * (2 * 4 + 1) * 256, 3)
    assert cost.estimate(MODEL, Options(), TOKENS).collectives == (0, 0, 0)


def test_devices_share_the_tokens_and_nothing_else():
    one, eight = (cost.estimate(MODEL, Options(devices=n), TOKENS * n) for n in (1, 8))
    assert one.flops == eight.flops
    assert one.peak_bytes == eight.peak_bytes


# --- a run, a machine, a budget ---------------------------------------------------------------------------------------

MACHINE = Machine("some", 1e14, 1e12)


def test_run_is_the_average_of_its_steps():
    found = cost.estimate(MODEL, Options(every=4, start=0.5, between="reuse"), TOKENS)
    assert dict(found.shares) == pytest.approx({"corrected": 1 / 8, "reused": 3 / 8, "plain": 1 / 2})
    steps = {kind: MACHINE.seconds(found.steps[kind]) for kind in found.shares}
    assert steps["plain"] == MACHINE.seconds(found.adamw) < steps["reused"] < steps["corrected"]
    mean = steps["corrected"] / 8 + steps["reused"] * 3 / 8 + steps["plain"] / 2
    assert found.time_ratio(MACHINE) == pytest.approx(mean / MACHINE.seconds(found.adamw))
    assert sum(x.flops for x in found.regions.values()) == pytest.approx(found.flops)
    assert found.peak_bytes == found.steps["corrected"].peak_bytes


def test_run_that_never_corrects_is_adamw():
    for never in ({"start": 1.0}, {"probability": 0.0}):
        found = cost.estimate(MODEL, Options(**never), TOKENS)
        assert (found.flops_ratio, found.time_ratio(MACHINE)) == (1, 1)
        assert found.peak_bytes == found.adamw.peak_bytes


def test_time_is_the_sum_of_what_each_rate_takes():
    step = cost.estimate(MODEL, Options(ascent="random", cotangent="keep"), TOKENS).steps["corrected"]
    work = step.work
    plain = work.flops / 1e14 + work.bytes / 1e12
    assert MACHINE.seconds(step) == pytest.approx(plain)
    rates = {"kept_flops_per_s": 1e13, "head_flops_per_s": 5e13, "taken_bytes_per_s": 1e10}
    rates |= {"exponentials_per_s": 1e9, "normals_per_s": 1e8}
    more = work.head / 1e14 + work.kept * 9e-14 + step.taken_bytes / 1e10
    more += work.exponentials / 1e9 + work.normals / 1e8
    assert dataclasses.replace(MACHINE, **rates).seconds(step) == pytest.approx(plain + more)


@pytest.mark.parametrize("path", ["functional", "sam"])
def test_within_a_budget(path):
    o = Options(path=path)
    every = cost.within(1.15, MODEL, MACHINE, o, tokens=TOKENS)
    ratios = [one.time_ratio(MACHINE) for _, one in every]
    assert ratios == sorted(ratios)
    assert max(ratios) <= 1.15
    needed = cost.within(1.15, MODEL, MACHINE, o, tokens=TOKENS, spare=False)
    assert 0 < len(needed) < len(every)
    for changes, _ in needed:
        for name in [k for k, x in changes.items() if (k, x) != ("fraction", 1)]:
            without = {k: x for k, x in changes.items() if k != name}
            assert cost.estimate(MODEL, dataclasses.replace(o, **without), TOKENS).time_ratio(MACHINE) > 1.15
    assert [changes for changes, _ in cost.within(1.0, MODEL, MACHINE, o, tokens=TOKENS)] == []
    everything = cost.within(math.inf, MODEL, MACHINE, o, tokens=TOKENS, spare=False)
    assert [changes for changes, _ in everything] == [{"fraction": 1.0}]


def test_micro_batches_narrow_the_fractions_that_fit():
    sets = cost.within(2.5, MODEL, MACHINE, Options(micro_batches=6), tokens=6144)
    assert {changes["fraction"] for changes, _ in sets} == {1, 1 / 2, 1 / 8, 1 / 16}


@pytest.mark.parametrize(
    ("given", "fractions"),
    [
        ({"form": "split", "ascent": "rest", "fraction": 0.5}, {1 / 2, 1 / 4, 1 / 8, 1 / 16}),
        ({"ascent": "micro", "micro_batches": 4}, {1}),
        ({"ascent": "part", "ascent_fraction": 0.25}, {1, 1 / 4}),
        ({"every": 2, "between": "reuse"}, {1, 1 / 2, 1 / 4, 1 / 8, 1 / 16}),
    ],
)
def test_a_budget_leaves_out_what_the_given_options_exclude(given, fractions):
    sets = cost.within(3, MODEL, MACHINE, Options(**given), tokens=TOKENS)
    assert {changes["fraction"] for changes, _ in sets} == fractions


def test_a_budget_does_not_change_what_is_kept():
    o = Options(fraction=1 / 3, every=3)
    kept = {"fraction", "every", "cut"}
    sets = cost.within(3, MODEL, MACHINE, o, tokens=TOKENS, kept=kept)
    assert [changes for changes, _ in sets] == [{"scope": "top:2"}, {}]
    assert {(x.options.fraction, x.options.every, x.options.start, x.options.cut) for _, x in sets} == {
        (1 / 3, 3, 0, "logits")
    }
    needed = cost.within(3, MODEL, MACHINE, o, tokens=TOKENS, kept=kept, spare=False)
    assert [changes for changes, _ in needed] == [{}]


def test_presets_are_options():
    ratios = [cost.estimate(MODEL, Options(**changes), TOKENS).flops_ratio for changes in cost.PRESETS.values()]
    assert list(cost.PRESETS) == ["exact", "balanced", "split", "cheap"]
    assert ratios == sorted(ratios, reverse=True)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "up"}, "path: 'up' is not known"),
        ({"dtype": "int8"}, "dtype: 'int8' is not known"),
        ({"framework": "mxnet"}, "framework: 'mxnet' is not known"),
        ({"cotangent": "auto"}, "cotangent: 'auto' is not known; use one of keep, recompute"),
        ({"micro_batches": 0}, "micro_batches must be a whole number >= 1, got 0"),
        ({"devices": 1.5}, "devices must be a whole number >= 1, got 1.5"),
        ({"start": 1.1}, r"start must be a share of the run, in \[0, 1\], got 1.1"),
        ({"scope": lambda name: True}, "use all, no-head, norms or top:K"),
        ({"fraction": 0}, r"fraction must be a number in \(0, 1\], got 0"),
        ({"path": "sam", "cut": "hidden"}, "needs the functional method"),
        ({"every": 4, "between": "reuse", "ascent": "momentum"}, "needs the plain gradient"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Options(**changes)


def test_other_bad_input_is_named():
    with pytest.raises(UserError, match="'top:5' asks for more than the 4 blocks"):
        cost.estimate(MODEL, Options(scope="top:5"), TOKENS)
    with pytest.raises(UserError, match="tokens must be > 0, got 0"):
        cost.estimate(MODEL, Options(), 0)
    with pytest.raises(UserError, match="model: vocabulary must be > 0, got 0"):
        dataclasses.replace(MODEL, vocabulary=0)
    with pytest.raises(UserError, match="machine: bytes_per_s must be > 0, got 0"):
        Machine("none", 1.0, 0)
    with pytest.raises(UserError, match="machine: 'h999' is not known; use one of a100, h100"):
        cost.published("h999")
    with pytest.raises(UserError, match=r"budget must be a number >= 1.* got 0.9"):
        cost.within(0.9, MODEL, MACHINE, tokens=TOKENS)
    with pytest.raises(UserError, match="AdamW has no correction"):
        cost.within(1.1, MODEL, MACHINE, Options(path="base"), tokens=TOKENS)


def test_importing_it_imports_neither_framework():
    code = "import sys, fsam_core.cost; sys.exit(bool({'jax', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
