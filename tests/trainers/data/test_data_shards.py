import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import prose

from fsam_core.errors import UserError
from fsam_trainers.data import prepare

IDS = np.random.default_rng(0).integers(0, 500, 2000)


def build(path: Path, **more):
    return prepare(str(path), **{"vocab_size": 500, "seq_len": 8, **more})


def test_one_file_is_mapped_in_place_and_its_end_held_out(tmp_path, cache):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    corpus = build(tmp_path / "x.bin")
    np.testing.assert_array_equal(corpus.train, IDS[:1900])
    np.testing.assert_array_equal(corpus.validation, IDS[1900:])
    assert isinstance(corpus.train, np.memmap)
    assert not corpus.train.flags.writeable
    assert corpus.folder == tmp_path
    assert corpus.description == "x.bin: 1,900 train / 100 validation tokens (uint16), vocabulary 500"
    assert not cache.exists()


@pytest.mark.usefixtures("few_held_out")
def test_meta_json_may_say_uint32_and_validation_bin_is_used(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint32"}))
    (IDS + 70000).astype("<u4").tofile(tmp_path / "train.bin")
    (IDS[:60] + 70000).astype("<u4").tofile(tmp_path / "validation.bin")
    corpus = build(tmp_path / "train.bin", vocab_size=71000)
    np.testing.assert_array_equal(corpus.train, IDS + 70000)
    np.testing.assert_array_equal(corpus.validation, IDS[:60] + 70000)
    bounded = build(tmp_path / "train.bin", vocab_size=71000, max_tokens=400)
    assert (bounded.train.size, bounded.validation.size) == (400, 20)
    assert bounded.fingerprint != corpus.fingerprint


def test_a_cache_entry_is_readable_as_shards(tmp_path):
    (tmp_path / "a.txt").write_text(prose(3000))
    built = prepare(str(tmp_path / "a.txt"), vocab_size=300, seq_len=8)
    shards = prepare(str(built.folder / "train.bin"), vocab_size=300, seq_len=8)
    assert shards.fingerprint == built.fingerprint
    np.testing.assert_array_equal(shards.validation, built.validation)


def test_the_fingerprint_follows_the_tokens_of_either_split(tmp_path):
    marks = set()
    for place in (None, 5, 1950):
        ids = IDS.copy()
        if place is not None:
            ids[place] = (ids[place] + 1) % 500
        ids.astype("<u2").tofile(tmp_path / "x.bin")
        marks.add(build(tmp_path / "x.bin").fingerprint)
    marks.add(build(tmp_path / "x.bin", vocab_size=501).fingerprint)
    assert len(marks) == 4


@pytest.mark.parametrize("place", [0, 1999])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, monkeypatch, place):
    monkeypatch.setattr("fsam_trainers.data.shards.CHUNK", 64)
    ids = IDS.copy()
    ids[place] = 50256
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"--data: .*x\.bin holds the token id 50256, --vocab-size is 500"):
        build(tmp_path / "x.bin")
    assert build(tmp_path / "x.bin", vocab_size=50257).vocab_size == 50257


@pytest.mark.parametrize(
    ("content", "meta", "parts"),
    [
        (b"", None, ["--data", "x.bin", "empty"]),
        (b"abc", None, ["--data", "x.bin", "3 bytes", "uint16"]),
        (b"abcdef", '{"dtype": "uint32"}', ["--data", "x.bin", "6 bytes", "uint32"]),
        (b"ab", '{"dtype": "float32"}', ["--data", "meta.json", "float32", "uint16"]),
        (b"ab", '{"dtype": []}', ["--data", "meta.json", "[]", "uint16"]),
        (b"ab", "[1]", ["--data", "meta.json", "uint16"]),
        (b"ab", "{", ["--data", "meta.json", "JSON"]),
        (b"\0\0" * 8, None, ["--data", "training", "8", "9"]),
        (b"\0\0" * 40, None, ["--data", "validation", "2", "9"]),
    ],
)
def test_bad_shards_are_named(tmp_path, content, meta, parts):
    (tmp_path / "x.bin").write_bytes(content)
    if meta is not None:
        (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(UserError) as error:
        build(tmp_path / "x.bin")
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_shards_and_a_tokenizer_do_not_go_together(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"--tokenizer: got t\.json, but --data .*x\.bin holds tokens already"):
        build(tmp_path / "x.bin", tokenizer=Path("t.json"))
