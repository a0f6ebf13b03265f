import numpy as np
import pytest

from fsam_core.errors import UserError
from fsam_trainers.data import Batches, validation_batches

TOKENS = np.arange(8 * 11 + 1 + 5, dtype=np.uint16)  # 11 windows of 8 and a tail that fills none


def starts(batch: np.ndarray) -> list[int]:
    return (batch[:, 0] // 8).tolist()


def test_a_batch_is_windows_that_overlap_by_one_token():
    batches = Batches(TOKENS, seq_len=8, batch_size=11, seed=0)
    batch = batches.at(0)
    assert batches.sequences == 11
    assert batch.dtype == np.int32
    assert batch.shape == (11, 9)
    ordered = batch[np.argsort(batch[:, 0])]
    np.testing.assert_array_equal(ordered[1:, 0], ordered[:-1, -1])
    np.testing.assert_array_equal(ordered, np.arange(0, 88, 8)[:, None] + np.arange(9))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 25])
def test_every_epoch_visits_every_window_once_across_batch_ends(batch_size):
    batches = Batches(TOKENS, 8, batch_size, seed=3)
    steps = -(-4 * 11 // batch_size)
    order = [start for step in range(steps) for start in starts(batches.at(step))]
    epochs = [order[e * 11 : (e + 1) * 11] for e in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_of_windows_does_not_depend_on_the_batch_size():
    small, large = Batches(TOKENS, 8, 2, seed=3), Batches(TOKENS, 8, 6, seed=3)
    np.testing.assert_array_equal(
        np.concatenate([small.at(step) for step in range(12)]), np.vstack([*map(large.at, range(4))])
    )


def test_a_step_is_a_pure_function_of_seed_and_step():
    one, other = Batches(TOKENS, 8, 4, seed=5), Batches(TOKENS.astype(np.uint32), 8, 4, seed=5)
    for step in (40, 0, 7, 40):  # not in order: nothing is remembered
        np.testing.assert_array_equal(one.at(step), other.at(step))
    assert any((Batches(TOKENS, 8, 4, seed=6).at(step) != one.at(step)).any() for step in range(3))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_have_their_parts_of_each_micro_batch(ranks, micro):
    whole = Batches(TOKENS, 8, 12, seed=3)
    of = [Batches(TOKENS, 8, 12, 3, rank=rank, ranks=ranks, micro_batches=micro) for rank in range(ranks)]
    for step in range(7):
        parts = [rank.at(step).reshape(micro, -1, 9) for rank in of]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1).reshape(12, 9), whole.at(step))


def test_a_large_seed_is_not_another_seeds_later_epoch():
    batch = Batches(TOKENS, 8, 11, seed=7)
    assert starts(Batches(TOKENS, 8, 11, seed=7 + (1 << 32)).at(0)) != starts(batch.at(1))


def test_ids_above_uint16_survive():
    tokens = np.array([70000, 2**31 - 1, 5], np.uint32)
    assert Batches(tokens, 2, 1, 0).at(0).tolist() == [[70000, 2**31 - 1, 5]]


def test_validation_takes_the_first_windows_in_order():
    batches = validation_batches(TOKENS, 8, batch_size=4, count=5)
    assert [starts(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # 11 windows: three fill no batch
    assert {(batch.shape, batch.dtype.name) for batch in batches} == {((4, 9), "int32")}
    assert len(validation_batches(TOKENS, 8, 4, count=1)) == 1
    assert validation_batches(TOKENS, 8, 4, count=0) == []


def test_validation_smaller_than_a_batch_is_one_smaller_batch():
    (batch,) = validation_batches(TOKENS, 8, batch_size=64, count=9)
    assert starts(batch) == list(range(11))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: Batches(TOKENS[:57], 128, 4, 0), ["--data", "training", "57", "129"]),
        (lambda: validation_batches(TOKENS[:57], 128, 4, 1), ["--data", "validation", "57", "129"]),
        (lambda: Batches(TOKENS, 0, 4, 0), ["--seq-len", "0"]),
        (lambda: Batches(TOKENS, 8, -2, 0), ["--batch", "-2"]),
        (lambda: Batches(TOKENS, 8, 4, -1), ["--seed", "-1"]),
        (lambda: Batches(TOKENS, 8, 4, 0, rank=0, ranks=3), ["--batch 4", "--micro-batches 1 times 3"]),
        (lambda: Batches(TOKENS, 8, 4, 0).at(-3), ["step", "-3"]),
        (lambda: validation_batches(TOKENS, 8, 0, 1), ["--batch", "0"]),
        (lambda: validation_batches(TOKENS, 0, 4, 1), ["--seq-len", "0"]),
        (lambda: validation_batches(TOKENS, 8, 4, -1), ["validation batches", "-1"]),
    ],
)
def test_bad_arguments_are_named(call, parts):
    with pytest.raises(UserError) as error:
        call()
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_exactly_one_sequence_is_enough():
    assert Batches(TOKENS[:9], 8, 3, 0).at(0).tolist() == [list(range(9))] * 3
