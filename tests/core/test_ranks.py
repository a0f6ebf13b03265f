"""Four gloo processes in DDP, under FSDP2 and on a 2x2 mesh against one process; `ranks_run.py` runs them."""

import re

import pytest
from rank_cases import CLOSE, DATA, assert_close, every_rank, of_kind, run

WEIGHTS_BYTES = 4 * (37 * 8 + 2 * (8 + 2 * 8 * 24))  # of the script's model, in float32
REPLICAS = ("ddp", "ddp-views", "ddp-unused", "ddp-static")
SHARDS = ("fsdp", "fsdp-remat", "hsdp")
COMPILED = ("ddp-compiled", "fsdp-compiled", "fsdp-remat-compiled")
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("case", DATA)
def test_training_is_that_of_one_process(case, ranks):
    assert_close(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kinds"), [(x, kinds) for kinds in (REPLICAS, SHARDS) for x in kinds])
def test_every_option_trains_as_in_one_process(kind, kinds, tmp_path):
    cases = of_kind(kind, kinds)
    found = run(tmp_path, cases)
    for case in cases:
        assert_close(found, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_model_trains_as_in_one_process(kind, tmp_path):
    cases = of_kind(kind, ("", *COMPILED))
    found = run(tmp_path, cases)
    for case in cases:
        assert_close(found, case)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["functional", "sam"])
def test_exact_step_adds_one_gradient_reduction_and_one_scalar(kind, method, ranks):
    assert_exact_step_adds_one_reduction(kind, method, ranks)


@pytest.mark.slow
def test_exact_step_adds_one_reduction_between_replicas(tmp_path):
    found = run(tmp_path, [f"hsdp:{name}:count" for name in ("adamw", "functional", "sam")])
    for method in ("functional", "sam"):
        assert_exact_step_adds_one_reduction("hsdp", method, found)


def assert_exact_step_adds_one_reduction(kind, method, ranks):
    plain, exact = (every_rank(ranks, f"{kind}:{name}:count") for name in ("adamw", method))
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


def test_fraction_in_ddp_reduces_gradients_twice(ranks):
    assert every_rank(ranks, "ddp:quarter:count")["counts"]["allreduce_"] == 2
    assert every_rank(ranks, "ddp:quarter:count")["bytes"]["allreduce_"] == 2 * WEIGHTS_BYTES
    # A wrapper that looks for unused parameters would leave what the other pass gave them unreduced.
    assert every_rank(ranks, "ddp-unused:quarter:count")["counts"]["allreduce_"] == 3


def test_split_step_in_ddp_reduces_gradients_twice(ranks):
    """Along an ascent that is known before the step nothing waits for the rest's gradient: once."""
    for name, count in (("split", 2), ("split-functional", 2), ("split-known", 1)):
        found = every_rank(ranks, f"ddp:{name}:count")
        assert (found["counts"]["allreduce_"], found["bytes"]["allreduce_"]) == (count, count * WEIGHTS_BYTES)


def test_ddp_reduces_micro_batches_together(ranks):
    plain, exact = (every_rank(ranks, f"ddp:{x}:count") for x in ("adamw", "precond-functional-micro"))
    assert exact["counts"]["allreduce_"] == 2 * plain["counts"]["allreduce_"]
    assert exact["bytes"]["allreduce_"] == 2 * WEIGHTS_BYTES


def test_ddp_reduces_micro_batches_together_with_masters(ranks):
    found = every_rank(ranks, "run:beside-masters")
    assert found["apart"] < CLOSE
    assert (found["counts"]["allreduce_"], found["bytes"]) == (2, 2 * WEIGHTS_BYTES)


def test_half_gradients_are_summed_in_float32_and_rounded_once(ranks):
    found = every_rank(ranks, "run:wide")
    assert found == {"same": True, "bytes": WEIGHTS_BYTES}


def test_local_ascent_follows_each_rank_and_reduces_once(ranks):
    found = every_rank(ranks, "run:local")
    assert found["apart"] < CLOSE
    assert found["from_global"] > 1e-2
    assert found["counts"] == {"scalar": 2, "allreduce_": 1}
    assert found["bytes"]["allreduce_"] == WEIGHTS_BYTES


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_pass_that_raises_restores_weights_and_run_resumes(kind, ranks):
    assert every_rank(ranks, f"run:raising-{kind}") == {"raised": True, "same": True, "resumes": True}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_non_finite_value_on_one_rank_is_skipped_by_all(kind, ranks):
    for rank in ranks:
        assert rank[f"run:not-finite-{kind}"] == {"1": [True, True, 1], "2": [True, True, 1]}


def test_evaluation_is_the_mean_over_all_tokens(ranks):
    assert max(every_rank(ranks, "run:evaluated")["apart"]) < 1e-6


def test_step_state_is_sharded_and_loads_again(ranks):
    found = every_rank(ranks, "run:remembered")
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
        ("no_sync", r"step: no_sync\(\) of DistributedDataParallel would leave .* MicroBatches"),
        ("gradient sync", r"step: set_requires_gradient_sync\(False\) would leave .* MicroBatches"),
    ],
)
def test_unsupported_setup_is_refused_in_one_sentence(case, said, ranks):
    assert re.search(said, every_rank(ranks, "run:refused")[case])
