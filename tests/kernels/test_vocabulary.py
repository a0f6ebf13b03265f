"""The head with its vocabulary over gloo processes (`head_ranks.py`) against the float64 oracle, and what they send."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spawn
import torch
from operations import DTYPES, Problem, Result, assert_as_good, back, head_oracle, head_plain
from test_linear_cross_entropy import OPTIONS, D, N, V, problem, with_options

SCRIPT = Path(__file__).with_name("head_ranks.py")
ALL = tuple(OPTIONS)


def masked(p: Problem, value: float) -> Problem:
    """The last fourteen columns, all that the last rank has and more, are closed by their bias."""
    b, b2 = (np.where(np.arange(V) < V - 14, x, value) for x in (p.bias, p.moved_bias))
    return p._replace(bias=b, moved_bias=b2, y=np.minimum(p.y, V - 15))


# Name -> (ranks, backend, dtype, keep, problem)
CASES: dict[str, tuple[int, str, str, bool, Problem]] = {}
for _dtype in DTYPES:
    for _scale, _keep in ((1, False), (1, True), (1000, True)):
        CASES[f"{_dtype} x{_scale} {'keep' if _keep else 'recompute'}"] = (
            4, "torch", _dtype, _keep, problem(_dtype, _scale),
        )  # fmt: skip
for _names in (*((name,) for name in OPTIONS), ALL):
    CASES[" ".join(_names)] = (2, "torch", "float32", False, with_options(_names, scale=3))
CASES[" ".join(ALL) + " kept"] = (4, "torch", "bfloat16", True, with_options(ALL, dtype="bfloat16", scale=3))
for _v in (9, 1):
    for _names in ((), ALL):
        CASES[f"{_v} columns {' '.join(_names)}"] = (4, "torch", "float32", False, with_options(_names, v=_v, scale=3))
CASES["one row"] = (4, "torch", "float32", False, problem(n=1))
CASES["all rows ignored"] = (4, "torch", "float32", False, problem(label_smoothing=0.1)._replace(y=np.full(N, -1)))
CASES["a closed part"] = (4, "torch", "float32", False, masked(problem(bias=True, scale=3), -np.inf))
# The interpreter takes milliseconds for each row and tile.
CASES["triton"] = (2, "triton", "float32", False, problem(scale=30, n=7))
CASES["triton in bfloat16"] = (4, "triton", "bfloat16", True, problem("bfloat16", 1000, n=7))
CASES["triton with all options"] = (2, "triton", "float32", False, with_options(ALL, scale=3, n=7))
CASES["triton with all options, 9 columns"] = (4, "triton", "float32", True, with_options(ALL, v=9, scale=3, n=7))
CASES["triton, a closed part"] = (4, "triton", "float32", False, masked(problem(bias=True, scale=3, n=7), -np.inf))
WRONG = problem()._replace(y=np.full(N, V))
CASES["a label outside"] = (4, "torch", "float32", False, WRONG)
# All cases run in one go of the ranks. `make test` has steps over a sharded vocabulary in core/test_tensor_ranks.py.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vocabulary")]
ORDINARY = [name for name in CASES if name not in ("a label outside", "all rows ignored")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    given = []
    for ranks, backend, dtype, keep, p in CASES.values():
        tensor = lambda x: None if x is None else torch.from_numpy(np.array(x))
        arrays = dict(zip(("h", "w", "h2", "w2", "b", "b2"), (p.h, p.w, *p.moved, p.bias, p.moved_bias), strict=True))
        given.append({
            "ranks": ranks, "backend": backend, "dtype": getattr(torch, dtype), "keep": keep, "loss": vars(p.loss),
            "chunk_bytes": 16 * -(-len(p.w) // ranks) * 8, "y": tensor(p.y), "weights": tensor(p.weights),
            **{name: tensor(x) for name, x in arrays.items()},
        })  # fmt: skip
    torch.save(given, folder / "cases.pt")
    spawn.run(SCRIPT, folder)
    return dict(zip(CASES, torch.load(folder / "found.pt", weights_only=False), strict=True))


@pytest.mark.parametrize("name", ORDINARY)
def test_error_is_within_that_of_plain_code_in_one_process(name, found):
    _, _, dtype, _, p = CASES[name]
    got = found[name]
    assert not any(got["errors"]), got["errors"]
    assert got["same"]  # loss, lse and h̄, to the bit
    if "closed part" in name:  # what the oracle can compute with
        p = masked(p, -1e30)
    plain, oracle = head_plain("torch", dtype, p), head_oracle(p)
    parts = (tuple(back(x) for x in got[part]) for part in ("base", "moved", "again"))
    result = Result(back(got["loss"]), back(got["lse"]), *parts)
    for field in ("loss_N", "lse_N"):
        assert_as_good(getattr(result, field), getattr(plain, field), getattr(oracle, field), dtype)
    for field in ("base", "moved", "again"):
        for x, like, o in zip(getattr(result, field), getattr(plain, field), getattr(oracle, field), strict=True):
            assert_as_good(x, like, o, dtype)


def test_parts_are_ragged_and_may_be_empty(found):
    assert found["one row"]["columns"] == [14, 14, 14, 11]
    assert found["9 columns "]["columns"] == [3, 3, 3, 0]
    assert found["1 columns "]["columns"] == [1, 0, 0, 0]


def test_all_rows_ignored_is_zero_and_keeps_the_true_lse(found):
    got, oracle = found["all rows ignored"], head_oracle(CASES["all rows ignored"][-1])
    assert not any(x.any() for x in (got["loss"], *got["base"], *got["moved"]))
    np.testing.assert_allclose(back(got["lse"]), oracle.lse_N, rtol=1e-6)


def test_label_outside_the_vocabulary_raises_on_every_rank(found):
    errors = found["a label outside"]["errors"]
    assert all(error.startswith("IndexError") for error in errors), errors


@pytest.mark.parametrize(("name", "floats"), [("float32 x1 recompute", 3), ("bfloat16 x1 keep", 3), (" ".join(ALL), 4)])
def test_few_floats_a_row_are_gathered_and_hbar_summed_once(name, floats, found):
    ranks = CASES[name][0]
    (counts, sizes), second = found[name]["sent"]
    hbar = {"allreduce_": N * D * 4}
    gathered = next(x for x in counts if "gather" in x)
    assert counts == {gathered: len_of_chunks(name), "allreduce_": 1}
    assert sizes == {gathered: ranks * floats * N * 4, **hbar}
    assert second == ({"allreduce_": 1}, hbar)


def len_of_chunks(name: str) -> int:
    """Chunks of 16 times 8 bytes for each of a part's columns."""
    _, _, dtype, _, p = CASES[name]
    each = {"float32": 4, "bfloat16": 6}[dtype] if p.loss.soft_cap is None else 16
    return -(-N // (16 * 8 // each))
