"""The table of docs/data.md, files x what happens: each row stored and streamed, with the documents or the error."""

from __future__ import annotations

import gzip
import io
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import documents, prose

from fsam_core.errors import UserError
from fsam_trainers.data import StreamedCorpus, load, prepare
from fsam_trainers.data.records import columns_of
from fsam_trainers.data.sharded import open_sharded

TEXTS = [prose(20, seed) for seed in range(40)]
BOOK = "\n".join(TEXTS)


def lines(texts: list, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)).encode()


def parquet(texts: list, column: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(texts, pa.string()), "id": range(len(texts))}), file, row_group_size=9)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def found(spec: str, column: str | None = None) -> tuple[list[str], list[str]]:
    """The documents of both splits, sorted: (stored, streamed)."""
    stored = prepare(spec, vocab_size=300, seq_len=8, text_column=column)
    text = open_sharded(spec, columns_of(column))
    streamed = []
    for shard in [*text.train, *(text.validation or ())]:
        pieces = ""
        for row in shard.rows(0, 0, 1):
            pieces += row.text
            if row.ends:
                streamed.append(pieces)
                pieces = ""
    return sorted(documents(stored.train, stored) + documents(stored.validation, stored)), sorted(streamed)


ROWS = {
    "JSON lines": ({"a.jsonl": lines(TEXTS)}, "a.jsonl"),
    "JSON lines as .ndjson": ({"a.ndjson": lines(TEXTS)}, "a.ndjson"),
    "JSON lines as .json, C4 unpacked": ({"c4.json": lines(TEXTS)}, "c4.json"),
    "the same in a folder": ({"c4-0.json": lines(TEXTS[:20]), "c4-1.json": lines(TEXTS[20:])}, ""),
    "the same by a glob": ({"x/c4-0.json": lines(TEXTS[:20]), "y/c4-1.json": lines(TEXTS[20:])}, "*/c4-*.json"),
    "JSON lines after blank ones": ({"a.json": b"\n \n" + lines(TEXTS)}, "a.json"),
    "JSON lines as .txt": ({"a.txt": lines(TEXTS)}, "a.txt"),
    "JSON lines with a byte order mark": ({"a.json": b"\xef\xbb\xbf" + lines(TEXTS)}, "a.json"),
    "JSON lines with Windows line ends": ({"a.json": lines(TEXTS).replace(b"\n", b"\r\n")}, "a.json"),
    "a column called content": ({"a.jsonl": lines(TEXTS, "content")}, "a.jsonl"),
    "Parquet": ({"a.parquet": parquet(TEXTS)}, "a.parquet"),
    "Parquet under another name": ({"train-0000": parquet(TEXTS, "content")}, "train-0000"),
    "compressed": ({"a.json.gz": gzip.compress(lines(TEXTS))}, "a.json.gz"),
    "rows below a folder with a readme": ({"README.md": b"About", "en/a.jsonl": lines(TEXTS)}, ""),
    "null, damaged and cut rows": (
        {"a.jsonl": lines([TEXTS[0], None, *TEXTS[1:]]) + b'{"id": 7}\n{"text": "\xff"}\n{oops\n{"text": "cut'},
        "a.jsonl",
    ),
    "null rows of Parquet": ({"a.parquet": parquet([TEXTS[0], None, *TEXTS[1:], None])}, "a.parquet"),
}


@pytest.mark.parametrize(("files", "spec"), ROWS.values(), ids=ROWS)
def test_rows_are_documents_stored_or_streamed(tmp_path, files, spec):
    stored, streamed = found(str(write(tmp_path / "data", files) / spec))
    assert stored == sorted(TEXTS)
    assert streamed == sorted(TEXTS)


@pytest.mark.parametrize("content", [lines(TEXTS, "body"), parquet(TEXTS, "body")], ids=["lines", "parquet"])
def test_the_text_column_can_be_named(tmp_path, content):
    path = str(write(tmp_path, {"train.json": content}) / "train.json")
    with pytest.raises(UserError, match=r'no "text", .* column, only: (id, body|body, id): .* --text-column'):
        found(path)
    assert found(path, "body") == (sorted(TEXTS), sorted(TEXTS))
    both = write(
        tmp_path,
        {
            "both.jsonl": "".join(
                f'{{"text": "no, not this one", "body": "{n} yes, this"}}\n' for n in range(90)
            ).encode()
        },
    )
    assert found(str(both / "both.jsonl"), "body")[0] == sorted(f"{n} yes, this" for n in range(90))
    assert set(found(str(both / "both.jsonl"))[1]) == {"no, not this one"}


TEXT = {
    "a text": ({"a.txt": BOOK.encode()}, "a.txt"),
    "with a byte order mark": ({"a.txt": b"\xef\xbb\xbf" + BOOK.encode()}, "a.txt"),
    "a folder with one text": ({"a.txt": BOOK.encode(), "b.dat": b"\0\1"}, ""),
}


@pytest.mark.parametrize(("files", "spec"), TEXT.values(), ids=TEXT)
def test_a_text_is_two_documents_stored_or_streamed(tmp_path, files, spec):
    stored, streamed = found(str(write(tmp_path / "data", files) / spec))
    assert stored == streamed
    assert len(stored) == 2
    assert BOOK in ("".join(stored), "".join(reversed(stored)))


FOLDERS = {
    "texts": {f"{n}.txt": text.encode() for n, text in enumerate(TEXTS)},
    "a byte order mark in one": {
        f"{n}.txt": b"\xef\xbb\xbf" * (n == 3) + text.encode() for n, text in enumerate(TEXTS)
    },
    "binary, Latin-1 and UTF-16 files beside": {
        **{f"{n}.txt": text.encode() for n, text in enumerate(TEXTS)},
        "a.png": b"\x89PNG\r\n\0\0",
        "latin.txt": "café".encode("latin-1"),
        "utf16.txt": "café".encode("utf-16"),
        "deep/tokens.bin": b"\1\0\2\0",
        "empty.txt": b"",
        ".git/HEAD": b"ref: main",
    },
    "a document of JSON among texts": {
        **{f"{n}.txt": text.encode() for n, text in enumerate(TEXTS[:-1])},
        "package.json": TEXTS[-1].encode(),
    },
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_files_of_a_folder_are_documents_stored_or_streamed(tmp_path, files):
    stored, streamed = found(str(write(tmp_path / "data", files)))
    assert stored == streamed == sorted(TEXTS)


def test_a_document_of_json_is_text(tmp_path):
    content = json.dumps({"name": "fsam", "scripts": {str(n): text for n, text in enumerate(TEXTS)}}, indent=2)
    stored, streamed = found(str(write(tmp_path, {"package.json": content.encode()}) / "package.json"))
    assert content in ("".join(stored), "".join(reversed(stored)))
    assert stored == streamed


def test_long_texts_are_whole_documents_stored_and_streamed(tmp_path):
    texts = [prose(8000, seed) for seed in range(3)]
    stored, streamed = found(str(write(tmp_path / "d", {f"{n}.txt": text.encode() for n, text in enumerate(texts)})))
    assert stored == streamed == sorted(texts)


LATE = b"x" * 9000 + b" \n"
REFUSED = {
    "NUL": ({"a.txt": b"abc\0def" * 9}, "a.txt", ["a.txt is not text: byte 3 is NUL"]),
    "NUL late in a folder": (
        {"a.txt": LATE + b"\0" + LATE, "b.txt": LATE},
        "",
        ["a.txt is not text: byte 9002 is NUL"],
    ),
    "Latin-1": (
        {"a.txt": "caf\xe9 ".encode("latin-1") * 9},
        "a.txt",
        ["byte 3 is 0xe9", "iconv -f ISO-8859-1 -t UTF-8"],
    ),
    "Latin-1 late in a folder": ({"a.txt": LATE + b"\xe9" + LATE, "b.txt": LATE}, "", ["byte 9002 is 0xe9", "iconv"]),
    "UTF-16": ({"a.txt": BOOK.encode("utf-16")}, "a.txt", ["is UTF-16 and not UTF-8", "iconv -f UTF-16 -t UTF-8"]),
    "UTF-32": ({"a.txt": BOOK.encode("utf-32")}, "a.txt", ["is UTF-32 and not UTF-8", "iconv -f UTF-32"]),
    "a table": ({"a.csv": b"text,label\nx,1\n"}, "a.csv", ["a.csv is a table", ".jsonl or .parquet"]),
    "a row that is no object": (
        {"a.jsonl": b'["text"]\n'},
        "a.jsonl",
        ["line 1: must be an object with a", "got list"],
    ),
    "gzip": ({"a.txt.gz": gzip.compress(BOOK.encode())}, "a.txt.gz", ["compressed (gzip)", "unpack it"]),
    "an array of JSON": (
        {"a.json": json.dumps([{"text": text} for text in TEXTS]).encode()},
        "a.json",
        ["one JSON array", "jq -c '.[]'"],
    ),
    "rows and texts by a glob": (
        {"a.jsonl": lines(TEXTS), "b.txt": b"text"},
        "*",
        ["several kinds", "a.jsonl", "b.txt"],
    ),
    "rows and texts below a folder": ({"x/a.jsonl": lines(TEXTS), "x/b.txt": b"text"}, "", ["several kinds", "glob"]),
    "tokens and texts": ({"a.bin": b"\1\0" * 50, "b.txt": b"text"}, "", ["several kinds", "a.bin", "b.txt"]),
    "tokens and rows": ({"train.bin": b"\1\0" * 50, "b.jsonl": lines(TEXTS)}, "", ["several kinds", "b.jsonl"]),
    "rows without a text": (
        {"a.jsonl": lines(TEXTS, "body")},
        "a.jsonl",
        ["line 1", "only: id, body", "--text-column"],
    ),
    "more damaged rows than one in a hundred": (
        {"a.jsonl": lines(TEXTS) + b"{oops\n" * 11},
        "a.jsonl",
        ["line 41: not a JSON object", "11 of the first 51 rows hold no text"],
    ),
}


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize(("files", "spec", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_stored_or_streamed(tmp_path, cache, files, spec, parts, stream):
    path = write(tmp_path / "data", files) / spec

    def read() -> None:
        corpus = load(str(path), stream=stream, vocab_size=300, seq_len=8, workers=0)
        assert isinstance(corpus, StreamedCorpus)  # a late error is found when the shard is read
        for shard in corpus.text.train:
            list(shard.rows(0, 0, 1))

    with pytest.raises(UserError) as error:
        read()
    assert all(part in str(error.value) for part in ["--data", *parts]), str(error.value)
    assert "\n" not in str(error.value)
    assert not [folder for folder in cache.glob("*") if not (folder / "meta.json").exists()]


def test_skipped_rows_are_counted_and_reported_once(tmp_path, caplog):
    content = lines([*TEXTS, None, *TEXTS, 5])
    path = write(tmp_path, {"a.jsonl": content}) / "a.jsonl"
    first = f'{path}, line 41: "text" must be a string, got NoneType'
    assert f"80 rows, 2 skipped ({first})," in prepare(str(path), vocab_size=300, seq_len=8).description
    assert [record.getMessage() for record in caplog.records] == [f"--data: 2 of 82 rows skipped, the first: {first}"]
    caplog.clear()
    text = open_sharded(str(path))
    numbers = [row.number for _ in range(3) for row in text.train[0].rows(0, 0, 1)]
    assert numbers == 3 * [n for n in range(82) if n not in (40, 81)]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("names", [("train.jsonl", "val.jsonl"), ("c4-train.jsonl", "c4-validation.jsonl")])
def test_files_named_val_are_held_out(tmp_path, names):
    folder = write(tmp_path / "d", {names[0]: lines(TEXTS[:30]), names[1]: lines(TEXTS[30:])})
    corpus = prepare(str(folder), vocab_size=300, seq_len=8)
    assert documents(corpus.train, corpus) == TEXTS[:30]
    assert documents(corpus.validation, corpus) == TEXTS[30:]
    assert [row.text for row in open_sharded(str(folder)).sample("validation")] == TEXTS[30:]


def test_files_named_test_are_left_out_beside_files_named_train(tmp_path):
    names = ("train-0.jsonl", "val-0.jsonl", "test-0.jsonl")
    folder = write(tmp_path / "d", {name: lines(TEXTS[n * 10 : n * 10 + 10]) for n, name in enumerate(names)})
    for spec in (str(folder), f"{folder}/*.jsonl"):
        stored, streamed = found(spec)
        assert stored == streamed == sorted(TEXTS[:20])
    assert prepare(str(folder), vocab_size=300, seq_len=8).description.startswith("d (without test-0.jsonl): 20 rows")
    assert found(str(folder / "test-0.jsonl"))[0] == sorted(TEXTS[20:30])


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"text_column": "body"}, "--text-column: got 'body', but --data .* holds text, not rows: leave it out"),
        ({"token_dtype": "uint32"}, "--token-dtype: got 'uint32', but --data .* holds text: leave it out"),
    ],
)
def test_an_option_of_no_use_is_refused(tmp_path, option, message, stream):
    path = write(tmp_path, {"a.txt": BOOK.encode()}) / "a.txt"
    with pytest.raises(UserError, match=message):
        load(str(path), stream=stream, vocab_size=300, seq_len=8, **option)


def test_a_vocabulary_that_no_memory_holds_is_refused(tmp_path):
    path = write(tmp_path, {"a.txt": BOOK.encode()}) / "a.txt"
    for stream in ("no", "yes"):
        with pytest.raises(UserError, match="--vocab-size: got 100000000, it must be at most 8388608"):
            load(str(path), stream=stream, vocab_size=10**8, seq_len=8)
