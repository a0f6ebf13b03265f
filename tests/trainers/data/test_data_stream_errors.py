"""A stream that cannot be read, and what may be asked of one: each is one sentence, and nothing hangs."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from streams import LENGTH, batches_of, small_chunks, stored_corpus, stream, with_buffer, write_shards  # noqa: F401
from tokenizers import Tokenizer

from fsam_core.errors import UserError
from fsam_trainers.data import StreamedBatches, StreamedCorpus, load, vocabulary
from fsam_trainers.data.documents import Row
from fsam_trainers.data.sharded import Shard, ShardedText
from fsam_trainers.data.stream import Recipe


def run(batches: StreamedBatches, start: int, stop: int, pause: float = 0.0) -> None:
    for step in range(start, stop):
        batches.at(step)
        time.sleep(pause)


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) - 10])
    elif how == "not JSON":
        path.write_bytes(b'{"text": "x"}\n' + b"not json\n" * 20 + content)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "how", "workers", "said"),
    [
        ("parquet", "truncated", 0, r"4\.parquet is a damaged Parquet file"),
        pytest.param("parquet", "truncated", 2, r"4\.parquet is a damaged Parquet file", marks=pytest.mark.slow),
        ("jsonl", "not JSON", 0, r"train-4\.jsonl, line 2: not a JSON object"),
        pytest.param(
            "gz", "truncated", 0, r"4\.jsonl\.gz is a damaged gzip file \(after line \d+\)", marks=pytest.mark.slow
        ),
        pytest.param(
            "zst", "truncated", 0, r"4\.jsonl\.zst is a damaged zstd file \(after line \d+\)", marks=pytest.mark.slow
        ),
        ("parquet", "gone", 0, r"4\.parquet.*No such file"),
        ("hf", "not JSON", 0, r"hf:.*, shard \d: the data set cannot be read"),
    ],
)
def test_a_shard_that_cannot_be_read_ends_the_run_and_is_named(tmp_path, monkeypatch, kind, how, workers, said):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # Whole when the sample is taken, so that it is the run that meets it.
    corpus = stream(write_shards(tmp_path / "set", kind), workers=workers)
    (path,) = (tmp_path / "set").glob("*4.*")
    spoil(path, how)
    batches = batches_of(corpus)
    began = time.monotonic()
    with pytest.raises(UserError, match=said) as error:
        run(batches, 0, 400)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60
    batches.close()


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_worker_ends_the_run_and_names_its_work(corpus, busy):
    batches = batches_of(with_buffer(corpus, 512, workers=2), batch=4)
    batches.at(0)
    if not busy:
        time.sleep(1.0)  # all that may be made ahead is made, and 127 batches lie in the buffer
    os.kill(batches.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        run(batches, 1, 10000, pause=0.001)
    assert time.monotonic() - began < 60
    message = str(error.value)
    assert f"process {batches.pids[1]} was killed by signal 9" in message
    assert ".parquet, from row " in message
    assert "\n" not in message
    pids = batches.pids
    batches.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_worker_that_cannot_start_is_reported(corpus):
    batches = batches_of(StreamedCorpus(**{**vars(corpus), "tokenizer": b"{}", "workers": 1}))
    with pytest.raises(UserError, match="the tokenizing process"):
        batches.at(0)
    batches.close()


def test_no_text_to_train_on_is_reported(tmp_path, corpus):
    text = ShardedText("blank", "", (Shard("blank", lambda start, part, parts: iter([Row(0, "")])),), ())
    with pytest.raises(UserError, match="--data: blank holds no text to train on"):
        StreamedBatches(Recipe(text, corpus.tokenizer, LENGTH, 0, 4), 2, 0).at(0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 20)
    with pytest.raises(UserError, match="holds no text to train on"):
        stream(str(path))


def test_the_vocabulary_and_the_held_out_rows_are_cached(tmp_path, monkeypatch):
    spec = write_shards(tmp_path / "set", "parquet")
    first = stream(spec)
    monkeypatch.setattr(vocabulary, "train_tokenizer", None)
    monkeypatch.setattr("fsam_trainers.data.pipeline.train_tokenizer", None)
    second = stream(spec, buffer=8)
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer == first.tokenizer
    np.testing.assert_array_equal(second.validation, first.validation)
    given = stream(spec, tokenizer=first.folder / "tokenizer.json")
    np.testing.assert_array_equal(given.validation, first.validation)
    held = [row.text for row in first.text.sample("validation")]
    decoded = Tokenizer.from_str(first.tokenizer.decode()).decode_batch(
        [part.tolist() for part in np.split(first.validation, np.flatnonzero(first.validation == 0) + 1)]
    )
    assert decoded[:-1] == held


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_file_edited_to_the_same_size_is_another_corpus_and_a_copied_one_is_not(tmp_path, prefix, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    spec = write_shards(tmp_path / "set", "jsonl")
    first = stream(prefix + spec)
    for path in (tmp_path / "set").iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert stream(prefix + spec).fingerprint == first.fingerprint
    for path in (tmp_path / "set").iterdir():
        path.write_text(path.read_text().replace("lazy", "zany"))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    edited = stream(prefix + spec)
    assert edited.fingerprint != first.fingerprint
    assert not np.array_equal(edited.validation, first.validation)


def test_what_is_streamed_if_nothing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    sizes = {"vocab_size": 300, "seq_len": LENGTH, "workers": 0}
    local = write_shards(tmp_path / "set", "jsonl")
    hub = load(f"hf:{local}", **sizes)
    assert isinstance(hub, StreamedCorpus)
    assert hub.description == (
        f"{local}: streamed (a data set of the hub) from 5 shards, shuffled in buffers of 2,048 sequences, "
        f"{hub.validation.size:,} validation tokens, vocabulary 300"
    )
    assert not isinstance(load(f"hf:{local}", max_tokens=1000, **sizes), StreamedCorpus)
    stored = load(local, **sizes)
    assert not isinstance(stored, StreamedCorpus)
    assert stored.description.endswith("tokens, vocabulary 300, stored")
    monkeypatch.setattr("fsam_trainers.data.loading.STREAMED_BYTES", 1000)
    large = load(local, **sizes)
    assert isinstance(large, StreamedCorpus)
    assert "streamed (0.0 GB, more than 1e-06) from 5 shards" in large.description
    assert not isinstance(load(local, stream="no", **sizes), StreamedCorpus)
    assert not isinstance(load(local, max_tokens=1000, **sizes), StreamedCorpus)
    assert not isinstance(load("python", max_tokens=1000, **sizes), StreamedCorpus)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stream": "maybe"}, "--stream: got 'maybe', it must be auto, yes or no"),
        ({"max_tokens": 1000}, "--max-tokens 1000: a stream has no bound"),
        ({"buffer": 0}, "--shuffle-buffer: got 0, it must be at least 1"),
        ({"workers": -1}, "--data-workers: got -1, it must be at least 0"),
        ({"vocab_size": 100}, "--vocab-size: got 100, byte-level BPE needs at least 257"),
        ({"seq_len": 0}, "--seq-len: got 0"),
        ({"seq_len": 10**6}, "--data: the validation split has [0-9,]+ tokens"),
        ({"tokenizer": Path("none.json")}, "--tokenizer: none.json cannot be read"),
    ],
)
def test_bad_arguments_are_named(tmp_path, more, said):
    spec = write_shards(tmp_path / "set", "jsonl")
    with pytest.raises(UserError, match=said):
        stream(spec, **more)


def test_a_file_of_tokens_needs_no_stream(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"--stream: --data .*train\.bin holds tokens"):
        stream(str(tmp_path / "train.bin"))
