"""A vocabulary sharded over four gloo processes, alone and under FSDP2; `tensor_ranks_run.py` runs them."""

import re

import pytest
from rank_cases import CLOSE, TENSOR, assert_close, every_rank, of_kind, run

KINDS = ("tensor", "fsdp-tensor", "fsdp-tensor-remat")
ROWS, WIDTH, PARTS = 16 * 5, 8, 4
EITHER = pytest.mark.parametrize("kind", ["tensor", pytest.param("fsdp-tensor", marks=pytest.mark.slow)])
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture
def found(kind, request):
    """What each rank found in the cases of this kind."""
    return request.getfixturevalue("ranks" if kind == "tensor" else "square_ranks")


@pytest.mark.parametrize("case", TENSOR)
def test_training_is_that_of_one_process(case, ranks):
    assert_close(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_trains_as_in_one_process(kind, tmp_path):
    cases = of_kind(kind, KINDS)
    found = run(tmp_path, cases)
    for case in cases:
        assert_close(found, case)


@EITHER
def test_every_option_of_a_head_kept_and_recomputed(kind, found):
    apart = every_rank(found, f"run:options-{kind}")
    assert max(apart.values()) < CLOSE, apart


@pytest.mark.parametrize(
    ("method", "gathered", "summed", "scalars"),
    [("adamw", 1, 1, 1), ("functional", 1, 2, 2), ("sam", 2, 2, 2), ("hidden-quarter", 2, 2, 2)],
)
def test_step_gathers_three_floats_a_row_and_sums_hbar(method, gathered, summed, scalars, ranks):
    """Besides norms and losses nothing else is sent; with the hidden cut the second pass has no vocabulary.

    The quarter and the rest of the batch are separate passes, over all rows together.
    """
    found = every_rank(ranks, f"tensor:{method}:count")
    assert found["counts"] == {"_allgather_base_": gathered, "allreduce_": summed, "scalar": scalars}
    once = method == "hidden-quarter"
    assert found["bytes"]["_allgather_base_"] == (1 if once else gathered) * 3 * PARTS * ROWS * 4
    assert found["bytes"]["allreduce_"] == (1 if once else summed) * ROWS * WIDTH * 4


@EITHER
def test_replicated_weights_stay_the_same_on_tensor_ranks(kind, found):
    for rank in found:
        assert rank[f"run:same-{kind}"] == {"uncut": 4, "same": True}


@EITHER
def test_pass_that_raises_restores_weights_and_run_resumes(kind, found):
    assert every_rank(found, f"run:raising-{kind}") == {"raised": True, "same": True, "resumes": True}


def test_non_finite_value_on_one_rank_is_skipped_by_all(ranks):
    for rank in ranks:
        assert rank["run:not-finite-tensor"] == {"skipped": True, "kept": True}


def test_checkpoint_resumes_bit_for_bit_and_loads_in_one_process(ranks):
    for rank in ranks:
        assert rank["run:checkpointed"] == {"loss": True, "resumes": True, "loads": True}


def test_evaluation_is_that_of_one_process(ranks):
    assert max(every_rank(ranks, "run:evaluated-tensor")["apart"]) < 1e-6


def test_bfloat16_compute_weights_over_float32_shards(ranks):
    found = every_rank(ranks, "run:mixed")
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
def test_unsupported_setup_is_refused_in_one_sentence(case, said, ranks):
    assert re.search(said, ranks[0]["run:refused-tensor"][case])
