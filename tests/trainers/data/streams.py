"""Sharded texts and streams of them, for the tests of streams."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import prose

from fsam_trainers.data import StreamedBatches, StreamedCorpus, feed, load, training_batches

TEXTS = [prose(3 + 5 * (seed % 7), seed) for seed in range(120)]
SHARDS = 5
LENGTH = 8


def write_shards(folder: Path, kind: str) -> str:
    folder.mkdir()
    for shard in range(SHARDS):
        texts = TEXTS[shard::SHARDS]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), folder / f"{shard}.parquet", row_group_size=10)
        elif kind == "gz":
            (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines))
        elif kind == "zst":
            with pa.output_stream(folder / f"{shard}.jsonl.zst", compression="zstd") as file:
                file.write(lines)
        else:
            (folder / f"train-{shard}.jsonl").write_bytes(lines)
    return f"hf:{folder}" if kind == "hf" else str(folder)


@pytest.fixture(name="corpus")
def stored_corpus(tmp_path) -> StreamedCorpus:
    return stream(write_shards(tmp_path / "set", "parquet"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shards, chunks and windows end at different places."""
    monkeypatch.setattr(feed, "CHUNK", 500)


def stream(spec: str, **more) -> StreamedCorpus:
    corpus = load(spec, **{"stream": "yes", "vocab_size": 300, "seq_len": LENGTH, "buffer": 16, "workers": 0, **more})
    assert isinstance(corpus, StreamedCorpus)
    return corpus


def batches_of(corpus: StreamedCorpus, batch: int = 4, seed: int = 0, **more) -> StreamedBatches:
    found = training_batches(corpus, LENGTH, batch, seed, **more)
    assert isinstance(found, StreamedBatches)
    return found


def with_buffer(corpus: StreamedCorpus, buffer: int, workers: int = 0) -> StreamedCorpus:
    return StreamedCorpus(**{**vars(corpus), "buffer": buffer, "workers": workers})
