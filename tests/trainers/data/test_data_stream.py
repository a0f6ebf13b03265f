"""A stream of batches: every document once an epoch over all ranks, shuffled in a bounded buffer, resumable exactly."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import LENGTH, TEXTS, batches_of, small_chunks, stored_corpus, stream, with_buffer, write_shards  # noqa: F401
from tokenizers import Tokenizer

from fsam_core.errors import UserError
from fsam_trainers.data import StreamedBatches, StreamedCorpus, feed, load, merged, training_batches
from fsam_trainers.data.documents import Row
from fsam_trainers.data.feed import assigned
from fsam_trainers.data.sharded import Shard, ShardedText
from fsam_trainers.data.stream import Recipe


def documents_in_order(corpus: StreamedCorpus, ranks: int, rank: int) -> Iterator[str]:
    """The documents of a rank's tokens, without end; windows are in order where the buffer is one."""
    tokenizer = Tokenizer.from_str(corpus.tokenizer.decode())
    batches = batches_of(with_buffer(corpus, 1), batch=ranks, rank=rank, ranks=ranks)
    pending: list[int] = []
    for step in range(10**6):
        for token in batches.at(step)[0, :-1].tolist():
            if token == 0:
                yield tokenizer.decode(pending)
                pending = []
            else:
                pending.append(token)


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("parquet", 1), ("parquet", 2), ("parquet", 4), ("parquet", 8), ("zst", 4), ("hf", 1), ("hf", 2), ("hf", 4)],
)
def test_ranks_see_disjoint_parts_in_a_new_order_each_epoch(tmp_path, monkeypatch, kind, ranks):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    corpus = stream(write_shards(tmp_path / "set", kind))
    held = {row.text for row in corpus.text.sample("validation")}
    wanted = sorted(text for text in TEXTS if text not in held)
    assert 1 <= len(held) < 20
    epochs: list[list[list[str]]] = [[], [], []]
    for rank in range(ranks):
        documents = documents_in_order(corpus, ranks, rank)
        for epoch in range(3):
            rows = [
                row.number
                for shard, part, parts in assigned(len(corpus.text.train), 0, epoch, rank, ranks)
                for row in corpus.text.train[shard].rows(0, part, parts)
                if corpus.text.trains(shard, row.number)
            ]
            epochs[epoch].append([next(documents) for _ in rows])
    for parts in epochs:
        assert sorted(text for part in parts for text in part) == wanted
        assert max(map(len, parts)) < 2 * min(map(len, parts))
    assert len({tuple(map(tuple, parts)) for parts in epochs}) == 3


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (1, 4), (5, 2), (8, 4), (3, 8), (17, 4)])
def test_parts_share_out_what_whole_shards_do_not_cover(shards, parts):
    for epoch in range(3):
        share = [assigned(shards, 7, epoch, part, parts) for part in range(parts)]
        covered = sorted((shard, row) for of in share for shard, which, all_ in of for row in range(which, 8, all_))
        assert covered == [(shard, row) for shard in range(shards) for row in range(8)]
        assert len({len(of) for of in share}) == 1


def test_windows_are_shuffled_within_buffers_of_the_stated_size(corpus):
    plain, shuffled, other = (batches_of(with_buffer(corpus, n), 8, seed) for n, seed in ((1, 0), (16, 0), (16, 1)))
    straight, mixed = (np.concatenate([batches.at(step) for step in range(40)]) for batches in (plain, shuffled))
    orders = []
    for start in range(0, 320, 16):
        block, ordered = mixed[start : start + 16], straight[start : start + 16]
        np.testing.assert_array_equal(block[np.lexsort(block.T)], ordered[np.lexsort(ordered.T)])
        assert (block != ordered).any()
        orders.append(tuple((block[:, None] == ordered[None]).all(-1).argmax(1)))
    assert len(set(orders)) == len(orders)
    assert (np.concatenate([other.at(step) for step in range(2)]) != mixed[:16]).any()


def test_a_window_starts_where_the_last_one_ended(corpus):
    batches = batches_of(with_buffer(corpus, 1), 4)
    flat = np.concatenate([batches.at(step) for step in range(300)])
    assert flat.dtype == np.int32
    assert flat.shape == (1200, LENGTH + 1)
    np.testing.assert_array_equal(flat[1:, 0], flat[:-1, -1])


@pytest.mark.parametrize("step", [0, 1, 3, 4, 17, 150, 700])
def test_a_restored_stream_gives_the_same_batches(corpus, step):
    whole = batches_of(corpus)
    wanted = [whole.at(n) for n in range(step + 60)]
    first = batches_of(corpus)
    for n in range(step):
        first.at(n)
    state = json.loads(json.dumps(first.state(step)))
    assert len(json.dumps(state)) < 300
    # Asking for a batch moves nothing that a checkpoint of the step before it would hold.
    first.at(step)
    assert first.state(step) == state
    np.testing.assert_array_equal(first.at(step), wanted[step])
    again = batches_of(with_buffer(corpus, 16, workers=2 if step == 17 else 0), seed=0)
    again.restore(state)
    for n in range(step, step + 60):
        np.testing.assert_array_equal(again.at(n), wanted[n])
    assert again.state(step + 60) == whole.state(step + 60)
    again.close()


def test_the_tested_moments_cover_documents_buffers_and_epochs(corpus):
    batches = batches_of(corpus)
    states = []
    for step in range(701):
        states.append(batches.state(step)["parts"]["0"])
        batches.at(step)
    assert states[17]["token"] > 0
    assert 0 < states[17]["used"] < 16
    assert states[4]["used"] == 16
    assert states[700]["epoch"] >= 1


def test_the_order_does_not_depend_on_the_number_of_workers(corpus):
    streams = [batches_of(with_buffer(corpus, 16, workers)) for workers in (0, 1, 3)]
    for step in range(150):
        none, one, three = (batches.at(step) for batches in streams)
        np.testing.assert_array_equal(none, one)
        np.testing.assert_array_equal(none, three)
    assert [len(batches.pids) for batches in streams] == [0, 1, 3]
    pids = [pid for batches in streams for pid in batches.pids]
    for batches in streams:
        batches.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_run_of_four_ranks_resumes_with_two_and_with_one(corpus):
    def all_ranks(ranks: int, state: dict | None = None) -> list[StreamedBatches]:
        made = [batches_of(corpus, 8, rank=rank, ranks=ranks) for rank in range(ranks)]
        for one in made if state else []:
            one.restore(state)
        return made

    def global_batch(ranks: list[StreamedBatches], step: int) -> np.ndarray:
        return np.concatenate([one.at(step) for one in ranks])

    four = all_ranks(4)
    for step in range(23):
        global_batch(four, step)
    state = json.loads(json.dumps(merged(one.state(23) for one in four)))
    wanted = [global_batch(four, step) for step in range(23, 60)]
    for ranks in (1, 2, 4):
        some = all_ranks(ranks, state)
        for step in range(23, 60):
            np.testing.assert_array_equal(global_batch(some, step), wanted[step - 23])
        assert merged(one.state(60) for one in some) == merged(one.state(60) for one in four)
    with pytest.raises(UserError, match="data are in 4 parts, which 8 ranks cannot share out"):
        batches_of(corpus, 8, rank=0, ranks=8).restore(state)
    with pytest.raises(UserError, match=r"lacks the state of parts \[0, 1\] of 4"):
        batches_of(corpus, 8, rank=0, ranks=2).restore(four[3].state(60))
    with pytest.raises(UserError, match="--batch 6 must be divisible by --micro-batches 1 times 4 processes"):
        batches_of(corpus, 6, rank=0, ranks=4)


def test_ranks_have_their_parts_of_each_micro_batch(corpus):
    plain = [batches_of(corpus, 16, rank=rank, ranks=2) for rank in range(2)]
    micro = [batches_of(corpus, 16, rank=rank, ranks=2, micro_batches=4) for rank in range(2)]
    state = merged(one.state(0) for one in micro)
    alone = batches_of(corpus, 16, micro_batches=4)
    alone.restore(state)
    for step in range(9):
        for one, other in zip(plain, micro, strict=True):
            np.testing.assert_array_equal(one.at(step), other.at(step))
        parts = [one.at(step).reshape(4, -1, LENGTH + 1) for one in micro]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1).reshape(16, -1), alone.at(step))


def endless(counted: list[int]) -> ShardedText:
    """A shard that nobody can read to its end."""

    def rows(start: int, part: int, parts: int) -> Iterator[Row]:
        number = start
        while True:
            counted[0] += 1
            yield Row(number, TEXTS[number % len(TEXTS)])
            number += 1

    return ShardedText("endless", "", (Shard("endless", rows),), ())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_reading_ahead_is_bounded_however_large_the_corpus(corpus, workers):
    counted = [0]
    batches = StreamedBatches(Recipe(endless(counted), corpus.tokenizer, LENGTH, 0, buffer=64), 4, workers)
    a_chunk = -(-feed.CHUNK // min(map(len, TEXTS)))  # rows in it at most
    tokens_a_row = 5  # at least: the shortest has more
    in_buffer = 64 * LENGTH // tokens_a_row
    ahead = -(-64 * LENGTH * 4 // feed.CHUNK) + 1 + workers + 1  # waiting, in hand, with the workers, being filled
    for step in range(48):
        batches.at(step)
        if step in (0, 1, 15, 47):
            time.sleep(0.4)  # let it read as far as it will
            used = (step // 16 + 1) * in_buffer
            assert counted[0] <= used + (ahead + 1) * a_chunk, step
    batches.close()


def test_a_stream_goes_forward_step_by_step(corpus):
    batches = batches_of(corpus)
    batches.at(0)
    batches.at(1)
    for step in (0, 3):
        with pytest.raises(UserError, match=f"a stream is at step 2 and goes forward one by one, got {step}"):
            batches.at(step)
        with pytest.raises(UserError, match=f"at step 2 was asked for step {step}"):
            batches.state(step)


def test_what_does_not_fit_a_checkpoint_is_reported(corpus, tmp_path):
    state = batches_of(corpus).state(0)
    with pytest.raises(UserError, match="--shuffle-buffer: got 17, the checkpoint was made with 16"):
        batches_of(with_buffer(corpus, 17)).restore(state)
    with pytest.raises(UserError, match="--stream: the checkpoint was made without it"):
        batches_of(corpus).restore(None)
    stored = training_batches(load("python", vocab_size=300, seq_len=8, max_tokens=500), LENGTH, 4, 0)
    stored.restore(stored.state(7))
    with pytest.raises(UserError, match="--stream: the checkpoint was made with a stream"):
        stored.restore(state)


def test_shards_that_changed_since_the_checkpoint_are_named(corpus, tmp_path):
    batches = batches_of(corpus)
    for step in range(20):
        batches.at(step)
    for path in (tmp_path / "set").iterdir():
        pq.write_table(pa.table({"text": ["only this"]}), path)
    again = batches_of(corpus)
    again.restore(batches.state(20))
    with pytest.raises(UserError, match=r"\.parquet is not what it was when the checkpoint was made, at row \d+"):
        again.at(20)
