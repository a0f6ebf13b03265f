import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import documents, prose

from fsam_core.errors import UserError
from fsam_trainers.data import documents as pieces
from fsam_trainers.data import prepare

TEXTS = [prose(30, seed) for seed in range(150)] + ["", "a\r\nb\u2028c\x00d", "", "<|endoftext|>x</s>"]


def build(path: Path, **more):
    return prepare(str(path), **{"vocab_size": 300, "seq_len": 8, **more})


def c4(texts: list[str]) -> bytes:
    """The rows of C4's own files."""
    stamp = "2019-04-25T12:57:54Z"
    rows = [{"text": text, "timestamp": stamp, "url": f"https://example.org/{n}"} for n, text in enumerate(texts)]
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode()


def write_parquet(path: Path, texts: list) -> Path:
    pq.write_table(pa.table({"text": texts, "url": [str(n) for n in range(len(texts))]}), path, row_group_size=40)
    return path


def write_records(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        return write_parquet(path, texts)
    path.write_bytes(gzip.compress(c4(texts)) if path.suffix == ".gz" else c4(texts))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "c4-train.00000-of-01024.json.gz", "a.parquet"])
def test_rows_come_back_exactly_whatever_the_file(tmp_path, name):
    corpus = build(write_records(tmp_path / name, TEXTS))
    train, validation = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    assert train == [text for n, text in enumerate(TEXTS) if pieces.row_split(n) == "train"]
    assert validation == [text for n, text in enumerate(TEXTS) if pieces.row_split(n) == "validation"]
    assert 2 <= len(validation) <= 15
    assert corpus.description.startswith(f"{name}: {len(TEXTS)} rows, {corpus.train.size:,} train / ")


def test_a_row_longer_than_a_piece_is_one_document(tmp_path):
    texts = [prose(200, seed).replace("\n", "\r\n") for seed in range(4)]
    corpus = build(write_records(tmp_path / "a.jsonl", texts))
    assert sorted(documents(corpus.train, corpus) + documents(corpus.validation, corpus)) == texts


def test_a_folder_of_shards_is_its_files_in_order(tmp_path):
    folder = tmp_path / "en"
    folder.mkdir()
    for n, name in enumerate(["c4-train.00000.json.gz", "c4-train.00001.jsonl", "c4-train.00002.parquet"]):
        write_records(folder / name, TEXTS[n * 50 : (n + 1) * 50])
    (folder / "README.md").write_text("not a row")
    corpus = build(folder)
    train, validation = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    assert sorted(train + validation) == sorted(TEXTS[:150])
    assert train == [text for text in TEXTS[:150] if text in train]
    assert 2 <= len(validation) <= 15


def test_files_named_validation_are_the_held_out_split(tmp_path):
    folder = tmp_path / "en"
    folder.mkdir()
    write_records(folder / "c4-train.00000-of-01024.json.gz", TEXTS[:80])
    write_records(folder / "c4-validation.00000-of-00008.json.gz", TEXTS[80:100])
    corpus = build(folder)
    assert documents(corpus.train, corpus) == TEXTS[:80]
    assert documents(corpus.validation, corpus) == TEXTS[80:100]
    alone = build(folder / "c4-validation.00000-of-00008.json.gz")
    assert sorted(documents(alone.train, alone) + documents(alone.validation, alone)) == sorted(TEXTS[80:100])


def test_two_rows_fill_both_splits(tmp_path):
    corpus = build(write_records(tmp_path / "a.jsonl", TEXTS[:2]))
    assert documents(corpus.train, corpus) == TEXTS[:1]
    assert documents(corpus.validation, corpus) == TEXTS[1:2]


def test_about_a_twentieth_of_the_rows_is_held_out():
    held = sum(pieces.row_split(n) == "validation" for n in range(20000))
    assert 900 < held < 1100


def test_blank_lines_are_skipped_and_lone_surrogates_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    text = prose(40)
    path.write_bytes(b"\n" + c4([text]) + b'  \n{"text": "half \\ud83d pair' + b" and more" * 10 + b'"}\n\n')
    corpus = build(path)
    assert documents(corpus.train, corpus) == [text]
    assert documents(corpus.validation, corpus) == ["half \ufffd pair" + " and more" * 10]


@pytest.mark.usefixtures("few_held_out")
def test_max_tokens_reads_no_further_than_needed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(c4([prose(30, seed) for seed in range(400)]) + b"not json\n" * 20)
    corpus = build(path, max_tokens=2000)
    assert corpus.train.size == 2000
    assert corpus.validation.size == 100
    with pytest.raises(UserError, match="line 401"):
        build(path)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", c4(TEXTS[:3]) + b"{oops\n" * 12, ["a.jsonl", "line 4", "not a JSON", "11 of the first 14 rows"]),
        ("a.jsonl", c4(TEXTS[:3]) + b'{"text": "\xff"}\n' * 12, ["a.jsonl", "line 4", "not a JSON"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl", "line 1", "not a JSON"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', ["a.jsonl", "line 1", '"text"', "body, id", "--text-column"]),
        ("a.jsonl", b'["text"]\n', ["a.jsonl", "line 1", '"text"', "list"]),
        ("a.jsonl", b'{"text": 5}\n', ["a.jsonl", "line 1", "int"]),
        ("a.jsonl", b"", ["a.jsonl", "no text"]),
        ("a.jsonl", b'{"text": ""}\n' * 200, ["a.jsonl", "no text"]),
        ("a.jsonl.gz", gzip.compress(c4(TEXTS), mtime=0)[:-200], ["a.jsonl.gz", "damaged gzip"]),
        ("a.jsonl.gz", c4(TEXTS), ["a.jsonl.gz", "damaged gzip", "line 0"]),
        ("a.json.gz", gzip.compress(c4(TEXTS), mtime=0)[:-8] + b"\0" * 8, ["a.json.gz", "damaged gzip"]),
        ("a.parquet", b"PAR1 but no more", ["a.parquet", "damaged Parquet"]),
        ("a.parquet", b"", ["a.parquet", "damaged Parquet"]),
    ],
)
def test_a_bad_record_file_is_named(tmp_path, cache, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        build(tmp_path / name)
    assert all(part in str(error.value) for part in ["--data", *parts]), str(error.value)
    assert not list(cache.iterdir())


def test_a_parquet_file_without_texts_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'--data: .*a\.parquet: no "text", .* column, only: body'):
        build(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", ["x", *[None] * 11])
    with pytest.raises(UserError, match=r'--data: .*b\.parquet, row 2: "text" must be a string, got NoneType; 11 of'):
        build(tmp_path / "b.parquet")


def test_parquet_with_a_damaged_page_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--data: .*a\.parquet is a damaged Parquet file"):
        build(path)
