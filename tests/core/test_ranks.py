"""Four gloo processes, in DDP, under FSDP2 and on a 2x2 mesh, take the steps of one process; `ranks_run.py` is them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks_run.py")
CLOSE = 1e-5
WEIGHTS_BYTES = 4 * (37 * 8 + 2 * (8 + 2 * 8 * 24))  # of the script's model, in float32
KINDS = ("ddp", "ddp-views", "ddp-unused", "ddp-static", "fsdp", "fsdp-remat", "hsdp")
COMPILED = ("ddp-compiled", "fsdp-compiled", "fsdp-remat-compiled")
METHODS = ("adamw", "adamw-clip", "sam", "precond-sam", "functional", "precond-functional", "logit")
OPTIONS = (
    "precond-functional-micro", "half-of-four", "quarter", "quarter-part", "quarter-sam", "quarter-logit", "hidden",
    "hidden-quarter", "every", "reuse", "start", "momentum", "previous", "random", "micro", "own-ascent", "top", "dual",
    "per-tensor",
)  # fmt: skip
QUICK = [
    "ddp:precond-functional-micro:6", "ddp-views:quarter:6", "ddp:hidden:6", "fsdp:quarter-part:6",
    "fsdp:precond-functional:6", "fsdp:hidden:6", "hsdp:precond-sam:6", "hsdp:logit:6", "ddp:top:6",
]  # fmt: skip
COUNTED = [f"{kind}:{name}:count" for kind in ("ddp", "fsdp", "hsdp") for name in ("adamw", "functional", "sam")]
COUNTED += [f"{kind}:precond-functional-micro:count" for kind in ("ddp", "fsdp")]
COUNTED += ["ddp:quarter:count", "ddp-unused:quarter:count"]
BEHAVIOUR = [
    "run:local", "run:raising-ddp", "run:raising-fsdp", "run:not-finite-ddp", "run:not-finite-fsdp", "run:evaluated",
    "run:refused", "run:remembered", "run:wide", "run:beside-masters",
]  # fmt: skip


def run(folder: Path, cases: list[str], script: Path = SCRIPT) -> list[dict]:
    """What each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder / "results.json"), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def every_rank(ranks: list[dict], case: str) -> dict:
    """What all found alike."""
    for one in ranks:
        assert "error" not in one[case], one[case]["error"]
    return ranks[0][case]


def assert_close(ranks: list[dict], case: str) -> None:
    every_rank(ranks, case)
    worst = {name: max(one[case][name] for one in ranks) for name in ranks[0][case]}
    assert max(worst.values()) < CLOSE, f"{case}: {worst}"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), [*QUICK, *COUNTED, *BEHAVIOUR])


@pytest.mark.parametrize("case", QUICK)
def test_losses_gradients_and_weights_are_those_of_one_process(case, quick):
    assert_close(quick, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *COMPILED])
def test_every_method_and_option_trains_as_one_process_for_twenty_steps(kind, tmp_path):
    cases = [f"{kind}:{name}" for name in (*METHODS, *OPTIONS)]
    found = run(tmp_path, cases)
    for case in cases:
        assert_close(found, case)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("method", ["functional", "sam"])
def test_an_exact_step_sends_adamws_set_and_one_more_reduction_of_gradients_and_one_scalar(kind, method, quick):
    plain, exact = (every_rank(quick, f"{kind}:{name}:count") for name in ("adamw", method))
    gathered = [name for name in plain["counts"] if "gather" in name]
    reduced = [name for name in plain["counts"] if name not in ("scalar", *gathered)]
    assert reduced
    for name in (*reduced, *gathered):  # FSDP2 gathers the weights for each pass
        assert exact["counts"][name] == 2 * plain["counts"][name], name
        assert exact["bytes"][name] == 2 * plain["bytes"][name], name
    # In DDP the gradients are the same on all ranks, and so are their norms.
    assert exact["counts"]["scalar"] == plain["counts"]["scalar"] + (kind != "ddp")
    assert plain["counts"]["scalar"] == 2  # the weight of the tokens; then the losses, and norms of shards
    assert exact["counts"].keys() == plain["counts"].keys()
    if kind == "ddp":
        assert (plain["counts"]["allreduce_"], plain["bytes"]["allreduce_"]) == (1, WEIGHTS_BYTES)


def test_on_part_of_the_batch_ddp_reduces_its_gradient_and_the_corrected_one(quick):
    assert every_rank(quick, "ddp:quarter:count")["counts"]["allreduce_"] == 2
    assert every_rank(quick, "ddp:quarter:count")["bytes"]["allreduce_"] == 2 * WEIGHTS_BYTES
    # A wrapper that looks for unused parameters would leave what the other pass gave them unreduced.
    assert every_rank(quick, "ddp-unused:quarter:count")["counts"]["allreduce_"] == 3


def test_micro_batches_are_reduced_together_by_ddp(quick):
    plain, exact = (every_rank(quick, f"ddp:{x}:count") for x in ("adamw", "precond-functional-micro"))
    assert exact["counts"]["allreduce_"] == 2 * plain["counts"]["allreduce_"]
    assert exact["bytes"]["allreduce_"] == 2 * WEIGHTS_BYTES


def test_beside_masters_too_they_are_reduced_together_and_where_the_masters_have_them(quick):
    found = every_rank(quick, "run:beside-masters")
    assert found["apart"] < CLOSE
    assert (found["counts"]["allreduce_"], found["bytes"]) == (2, 2 * WEIGHTS_BYTES)


def test_half_gradients_are_summed_in_float32_and_rounded_once(quick):
    found = every_rank(quick, "run:wide")
    assert found == {"same": True, "bytes": WEIGHTS_BYTES}


def test_local_ascents_are_those_of_each_ranks_own_rows_and_reduce_gradients_once(quick):
    found = every_rank(quick, "run:local")
    assert found["apart"] < CLOSE
    assert found["from_global"] > 1e-2
    assert found["counts"] == {"scalar": 2, "allreduce_": 1}
    assert found["bytes"]["allreduce_"] == WEIGHTS_BYTES


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_pass_that_raises_leaves_the_weights_as_they_were_to_the_bit_and_the_run_goes_on(kind, quick):
    assert every_rank(quick, f"run:raising-{kind}") == {"raised": True, "same": True, "goes_on": True}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(kind, quick):
    for rank in quick:
        assert rank[f"run:not-finite-{kind}"] == {"1": [True, True, 1], "2": [True, True, 1]}


def test_evaluation_is_the_mean_over_all_ranks_tokens(quick):
    assert max(every_rank(quick, "run:evaluated")["apart"]) < 1e-6


def test_what_a_step_remembers_is_sharded_and_loads_again(quick):
    found = every_rank(quick, "run:remembered")
    assert found["losses"][0] == found["losses"][1]
    assert found["whole"] == 0


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("local", r"sync: 'local' .* FSDP2 .* sync='global'"),
        ("sync", r"sync: 'each' is not known"),
        ("no root", r"model: .* call fully_shard on the model itself"),
        ("resharded", r"features: the head's weight is resharded"),
        ("own", r"features: the head's weight is a shard"),
        ("copies", r"optimizer: .* MixedPrecisionPolicy"),
        ("compiled", r"model: compile it before it is wrapped"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(case, said, quick):
    assert re.search(said, every_rank(quick, "run:refused")[case])
