"""A vocabulary over four gloo processes, alone and under FSDP2 on a 2x2 mesh; `tensor_ranks_run.py` is them."""

import re
from pathlib import Path

import pytest
from test_ranks import CLOSE, METHODS, OPTIONS, assert_close, every_rank, run

SCRIPT = Path(__file__).with_name("tensor_ranks_run.py")
KINDS = ("tensor", "fsdp-tensor", "fsdp-tensor-remat")
QUICK = [
    "tensor:precond-functional-micro:4", "tensor:quarter-part:4", "tensor:hidden:4", "tensor:random:4",
    "fsdp-tensor:adamw-clip:4", "fsdp-tensor:precond-functional:4", "fsdp-tensor:logit:4", "fsdp-tensor:random:4",
    "fsdp-tensor-remat:hidden-quarter:4", "fsdp-tensor-remat:precond-sam:4",
]  # fmt: skip
COUNTED = [f"tensor:{name}:count" for name in ("adamw", "functional", "hidden-quarter", "sam")]
BEHAVIOUR = [
    "run:options-tensor", "run:options-fsdp-tensor", "run:same-tensor", "run:same-fsdp-tensor", "run:raising-tensor",
    "run:raising-fsdp-tensor", "run:not-finite-tensor", "run:checkpointed", "run:evaluated-tensor", "run:mixed",
    "run:refused-tensor",
]  # fmt: skip
ROWS, WIDTH, PARTS = 16 * 5, 8, 4


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), [*QUICK, *COUNTED, *BEHAVIOUR], SCRIPT)


@pytest.mark.parametrize("case", QUICK)
def test_losses_gradients_and_weights_are_those_of_one_process(case, quick):
    assert_close(quick, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_and_option_trains_as_one_process_for_twenty_steps(kind, tmp_path):
    cases = [f"{kind}:{name}" for name in (*METHODS, *OPTIONS)]
    found = run(tmp_path, cases, SCRIPT)
    for case in cases:
        assert_close(found, case)


@pytest.mark.parametrize("kind", ["tensor", "fsdp-tensor"])
def test_every_option_of_a_head_with_its_cotangent_kept_and_recomputed(kind, quick):
    found = every_rank(quick, f"run:options-{kind}")
    assert max(found.values()) < CLOSE, found


@pytest.mark.parametrize(
    ("method", "gathered", "summed", "scalars"),
    [("adamw", 1, 1, 1), ("functional", 1, 2, 2), ("sam", 2, 2, 2), ("hidden-quarter", 2, 2, 2)],
)
def test_a_step_gathers_three_floats_a_row_and_sums_hbar_for_each_pass(method, gathered, summed, scalars, quick):
    """And nothing else but norms and losses; a second pass from the hidden cut has no vocabulary in it.

    The quarter and the rest of the batch are passes of their own, of all rows together.
    """
    found = every_rank(quick, f"tensor:{method}:count")
    assert found["counts"] == {"_allgather_base_": gathered, "allreduce_": summed, "scalar": scalars}
    once = method == "hidden-quarter"
    assert found["bytes"]["_allgather_base_"] == (1 if once else gathered) * 3 * PARTS * ROWS * 4
    assert found["bytes"]["allreduce_"] == (1 if once else summed) * ROWS * WIDTH * 4


@pytest.mark.parametrize("kind", ["tensor", "fsdp-tensor"])
def test_weights_that_are_not_cut_stay_the_same_on_all_tensor_ranks_to_the_bit(kind, quick):
    for rank in quick:
        assert rank[f"run:same-{kind}"] == {"uncut": 4, "same": True}


@pytest.mark.parametrize("kind", ["tensor", "fsdp-tensor"])
def test_a_pass_that_raises_leaves_the_weights_as_they_were_to_the_bit_and_the_run_goes_on(kind, quick):
    assert every_rank(quick, f"run:raising-{kind}") == {"raised": True, "same": True, "goes_on": True}


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(quick):
    for rank in quick:
        assert rank["run:not-finite-tensor"] == {"skipped": True, "kept": True}


def test_a_checkpoint_goes_on_to_the_bit_and_loads_in_one_process(quick):
    for rank in quick:
        assert rank["run:checkpointed"] == {"loss": True, "goes_on": True, "loads": True}


def test_evaluation_is_that_of_one_process(quick):
    assert max(every_rank(quick, "run:evaluated-tensor")["apart"]) < 1e-6


def test_bfloat16_compute_weights_over_float32_shards(quick):
    found = every_rank(quick, "run:mixed")
    assert found["dtypes"] == ["torch.float32"]
    assert 0 < found["apart"] < 5e-3


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("features", r"features: the head's weight is placed as S.*0.* on a mesh of 1 axes; .* Shard\(1\)"),
        ("axes", r"features: the head's weight is placed as .* on a mesh of 2 axes"),
        ("uneven", r"features: the head's weight has 1 of 37 .* on rank 0 of 4; .* 10 to a rank"),
        ("bias", r"features: the head's weight is cut along the vocabulary and its bias is not"),
        ("bias alone", r"features: the head's bias is cut, .*, and its weight is not"),
        ("hidden", r"features: hidden is a DTensor placed as .* Replicate\(\)"),
        ("labels", r"features: labels is a DTensor placed as .* Replicate\(\)"),
        ("copies", r"optimizer: .* MixedPrecisionPolicy"),
        ("no data", r"model: .* nothing averages gradients over data"),
        ("", r"^$"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(case, said, quick):
    assert re.search(said, quick[0]["run:refused-tensor"][case])
