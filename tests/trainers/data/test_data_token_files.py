import json
import struct
from pathlib import Path

import numpy as np
import pytest
from data_helpers import prose

from fsam_core.errors import UserError
from fsam_trainers.data import Batches, load, prepare, validation_batches
from fsam_trainers.data.corpus import JoinedTokens

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
    assert corpus.description == "x.bin: 1,900 train / 100 validation tokens (uint16 by its values), vocabulary 500"
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
    monkeypatch.setattr("fsam_trainers.data.token_files.CHUNK", 64)
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


# --- formats ----------------------------------------------------------------------------------------------------------

WIDE = IDS + 70000


def llmc(
    ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2", count: int | None = None
) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, ids.size if count is None else count
    return header.tobytes() + ids.astype(dtype).tobytes()


def megatron(path: Path, ids: np.ndarray, dtype: str, code: int, version: int = 1) -> None:
    """The two files of a data set of three sequences, as Megatron's preprocess_data.py writes them."""
    ids.astype(dtype).tofile(path)
    lengths = np.array([100, 700, ids.size - 800], "<i4")
    pointers = (np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, 3, 4)
    documents = np.arange(4, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + documents.tobytes())


def whole(corpus) -> np.ndarray:
    """All tokens, training and held out."""
    return np.concatenate([split[np.arange(split.size)] for split in (corpus.train, corpus.validation)])


def test_nanogpt_two_files_and_a_pickle_that_is_not_opened(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS[:300].astype("<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")  # would end the process
    (tmp_path / "prepare.py").write_text("print('not a text')")
    for spec in (tmp_path, tmp_path / "train.bin", f"{tmp_path}/*.bin"):
        corpus = build(spec)
        np.testing.assert_array_equal(corpus.train[np.arange(2000)], IDS)
        np.testing.assert_array_equal(corpus.validation[np.arange(300)], IDS[:300])


@pytest.mark.parametrize(
    ("ids", "options"), [(IDS, {}), (WIDE, {"magic": 20240801, "version": 7, "dtype": "<u4"})], ids=["gpt-2", "llama-3"]
)
def test_llmc_files_have_a_header_that_is_no_token(tmp_path, ids, options):
    (tmp_path / "x.bin").write_bytes(llmc(ids, **options))
    corpus = build(tmp_path / "x.bin", vocab_size=71000)
    np.testing.assert_array_equal(whole(corpus), ids)
    assert "by its header" in corpus.description
    assert isinstance(corpus.train, np.memmap)


@pytest.mark.parametrize(
    ("ids", "dtype", "code"), [(IDS, "<u2", 8), (WIDE, "<i4", 4), (WIDE, "<i8", 5)], ids=["uint16", "int32", "int64"]
)
def test_megatrons_index_states_the_type(tmp_path, ids, dtype, code):
    megatron(tmp_path / "x_text_document.bin", ids, dtype, code)
    for spec in (tmp_path, tmp_path / "x_text_document.bin"):
        corpus = build(spec, vocab_size=71000)
        np.testing.assert_array_equal(whole(corpus), ids)
        assert "by x_text_document.idx" in corpus.description


@pytest.mark.parametrize(("ids", "dtype"), [(WIDE, "uint32"), (IDS, "uint32"), (WIDE, "int64"), (IDS, "int64")])
def test_a_wider_type_is_seen_by_its_values_or_given(tmp_path, ids, dtype):
    ids.astype(dtype).tofile(tmp_path / "x.bin")
    seen, given = (build(tmp_path / "x.bin", vocab_size=71000, **more) for more in ({}, {"token_dtype": dtype}))
    np.testing.assert_array_equal(whole(seen), ids)
    np.testing.assert_array_equal(whole(given), ids)
    assert f"({dtype} by its values)" in seen.description
    assert f"({dtype} by --token-dtype)" in given.description


def test_two_ids_only_are_no_wider_type(tmp_path):
    ids = IDS % 2
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    np.testing.assert_array_equal(whole(build(tmp_path / "x.bin")), ids)


def test_uint16_that_the_vocabulary_does_not_fit_must_be_given(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(
        UserError, match=r"x\.bin does not state .* uint16 cannot hold --vocab-size 100277: give --token"
    ):
        build(tmp_path / "x.bin", vocab_size=100277)
    np.testing.assert_array_equal(whole(build(tmp_path / "x.bin", vocab_size=100277, token_dtype="uint16")), IDS)


@pytest.mark.parametrize("spec", ["", "fineweb_*.bin"])
def test_a_folder_or_glob_of_shards_is_one_array(tmp_path, spec):
    for n, part in enumerate((IDS[:700], IDS[700:701], IDS[701:])):
        (tmp_path / f"fineweb_train_{n:06}.bin").write_bytes(llmc(part))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llmc(IDS[:90]))
    corpus = build(tmp_path / spec)
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS[:90].astype("<u2").tofile(tmp_path / "val.bin")
    one = build(tmp_path / "train.bin")
    assert corpus.fingerprint == one.fingerprint
    batches = [Batches(found.train, 8, 16, seed=3) for found in (corpus, one)]
    for step in range(30):
        np.testing.assert_array_equal(batches[0].at(step), batches[1].at(step))
    held = [validation_batches(found.validation, 8, 4, 9) for found in (corpus, one)]
    np.testing.assert_array_equal(held[0], held[1])


@pytest.mark.usefixtures("few_held_out")
def test_max_tokens_cut_joined_shards(tmp_path):
    for n in range(3):
        IDS[n * 600 : (n + 1) * 600].astype("<u2").tofile(tmp_path / f"{n}.bin")
    corpus = build(tmp_path, max_tokens=1000)
    np.testing.assert_array_equal(corpus.train[np.arange(1000)], IDS[:1000])
    np.testing.assert_array_equal(corpus.validation[np.arange(50)], IDS[1710:1760])


def test_joined_tokens_are_indexed_like_one_array():
    parts = [IDS[:5], IDS[5:5], IDS[5:1000], IDS[1000:]]
    joined, places = JoinedTokens(parts), np.random.default_rng(1).integers(0, 2000, (30, 9))
    np.testing.assert_array_equal(joined[places], IDS[places])
    for span in (slice(None), slice(3, 1200), slice(1990, 5000), slice(7, 7), slice(None, None)):
        assert joined[span].tobytes() == IDS[span].tobytes()
        assert joined[span].size == IDS[span].size


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("files", "more", "parts"),
    [
        ({"x.bin": llmc(IDS, count=1999)}, {}, ["its header says 1,999 tokens, it holds 2,000"]),
        ({"x.bin": llmc(IDS, version=2)}, {}, ["a file of llm.c, but not of tokens", "version 2"]),
        ({"x.bin": llmc(IDS, magic=20240326)}, {}, ["a file of llm.c, but not of tokens", "20240326"]),
        ({"x.bin": llmc(IDS)}, {"token_dtype": "uint32"}, ["--token-dtype: got uint32", "uint16 by its header"]),
        ({"x.bin": IDS.astype("<u2").tobytes()}, {"token_dtype": "float"}, ["--token-dtype: got 'float'", "int64"]),
        ({"x.bin": (-IDS).astype("<i4").tobytes()}, {"token_dtype": "int32"}, ["the token id -", "another type"]),
        ({"x.bin": WIDE.astype("<u4").tobytes()}, {"token_dtype": "uint16"}, ["every other id", "give a wider one"]),
        ({"x.bin": IDS.astype("<u2").tobytes()}, {"token_dtype": "uint32"}, ["holds the token id", "type than uint32"]),
        ({"x.bin": b"A plain text, called .bin. " * 90}, {}, ["x.bin is text"]),
        ({"x.bin": b"PK\x03\x04" + bytes(900)}, {}, ["x.bin is a zip archive, as PyTorch saves weights"]),
        ({"x.bin": IDS.astype("<u2").tobytes(), "x.idx": b"TNTIDX\0\0" + bytes(99)}, {}, ["x.idx is no index of"]),
        (
            {"x_train.bin": llmc(IDS), "y_train.bin": WIDE.astype("<u4").tobytes()},
            {},
            ["holds uint16", "and", "uint32"],
        ),
        ({"train.bin": IDS.astype("<u2").tobytes(), "val.bin": b""}, {}, ["val.bin is empty"]),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, files, more, parts):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    bins = [name for name in files if name.endswith(".bin")]
    with pytest.raises(UserError) as error:
        build(
            tmp_path / bins[0] if len(bins) == 1 else tmp_path,
            vocab_size=71000 if "y_train.bin" in files else 500,
            **more,
        )
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(("change", "parts"), [("code", ["states the dtype code 7"]), ("cut", ["they do not belong"])])
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, parts):
    megatron(tmp_path / "x.bin", IDS, "<u2", 7 if change == "code" else 8)
    if change == "cut":
        cut(tmp_path / "x.bin")
    with pytest.raises(UserError) as error:
        build(tmp_path / "x.bin")
    assert all(part in str(error.value) for part in ["x.idx", *parts]), str(error.value)


def test_shards_are_never_streamed(tmp_path):
    for n in range(2):
        IDS.astype("<u2").tofile(tmp_path / f"{n}.bin")
    assert "stored" in load(str(tmp_path), vocab_size=500, seq_len=8).description
    with pytest.raises(UserError, match=r"--stream: --data .* holds tokens"):
        load(str(tmp_path), stream="yes", vocab_size=500, seq_len=8)
