"""Shards: what they hold, from any row on, in any share; what is held out; which files a SPEC names."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import prose

from fsam_core.errors import UserError
from fsam_trainers.data import prepare, text
from fsam_trainers.data.documents import Row, row_split
from fsam_trainers.data.records import Skipped, record_rows
from fsam_trainers.data.sharded import ShardedText, open_sharded
from fsam_trainers.data.text import text_rows

TEXTS = [prose(12, seed) for seed in range(100)]
NAMES = ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet"]


def write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), path, row_group_size=7)
    elif path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def both(text: ShardedText) -> tuple[list[str], list[str]]:
    """The texts that are trained on, and those held out."""
    trained = [
        row.text for n, shard in enumerate(text.train) for row in shard.rows(0, 0, 1) if text.trains(n, row.number)
    ]
    return trained, [row.text for row in text.sample("validation")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("start", "part", "parts"), [(0, 0, 1), (0, 2, 3), (6, 0, 1), (7, 1, 2), (50, 3, 4), (99, 0, 1)]
)
def test_rows_from_any_on_in_any_share(tmp_path, name, start, part, parts):
    path = write(tmp_path / name, TEXTS)
    wanted = [Row(n, text) for n, text in enumerate(TEXTS) if n >= start and n % parts == part]
    assert list(record_rows(path, start, part, parts)) == wanted
    assert list(record_rows(path, 100, part, parts)) == []


def test_rows_of_another_part_are_not_decoded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\nnot json\n{"text": "y"}\n')
    assert [row.text for row in record_rows(path, 0, 0, 2)] == ["x", "y"]
    skipped = Skipped()
    assert list(record_rows(path, 0, 1, 2, skipped=skipped)) == []
    assert skipped.first.startswith(f"{path}, line 2: not a JSON object")


@pytest.mark.parametrize(
    "content",
    [prose(900), "é€🙂" * 400, "x" * 999 + "\n" + "y" * 1001, "a\n" * 300, "a\n \n\tb\n" * 90, "🙂"],
    ids=["prose", "no line", "two lines", "short lines", "indented", "one character"],
)
@pytest.mark.parametrize(("piece", "reach"), [(64, 16), (100, 99), (13, 6)])
def test_pieces_of_a_text_are_the_text(tmp_path, monkeypatch, content, piece, reach):
    monkeypatch.setattr(text, "PIECE", piece)
    monkeypatch.setattr(text, "REACH", reach)
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    rows = list(text_rows(path, 0, 0, 1))
    assert "".join(row.text for row in rows) == content
    assert [row.number for row in rows] == list(range(-(-len(content.encode()) // piece)))
    assert [row.ends for row in rows] == [False] * (len(rows) - 1) + [True]
    assert [row.starts for row in rows] == [True] + [False] * (len(rows) - 1)
    # From any piece on, in any share, any range of them: the same pieces.
    middle = len(rows) // 2
    assert list(text_rows(path, middle, 0, 1)) == rows[middle:]
    shares = [row for part in range(3) for row in text_rows(path, 0, part, 3)]
    assert sorted(shares) == [row._replace(ends=True, starts=True) for row in rows]
    cut = text.held_out_from(path)
    spans = [[row.text for row in text_rows(path, 0, 0, 1, **span)] for span in ({"end": cut}, {"begin": cut})]
    assert "".join(spans[0]) == content.encode()[:cut].decode()
    assert "".join(spans[0] + spans[1]) == content


def test_pieces_end_with_a_line_where_one_is_near(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(prose(20000).encode())
    rows = list(text_rows(path, 0, 0, 1))
    assert len(rows) > 3
    assert all(row.text.endswith("\n") for row in rows[:-1])


def test_a_text_that_is_none_is_named_or_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 70000 + b"\xff")
    with pytest.raises(UserError, match=r"--data: .*a\.txt is not UTF-8 text: byte 70000 is 0xff"):
        list(text_rows(path, 0, 0, 1))
    path.write_bytes(b"\x89PNG\0" * 10)
    with pytest.raises(UserError, match=f"{tmp_path} holds no text.*; a.txt is not text"):
        open_sharded(str(tmp_path))
    path.write_bytes(b"a" + "🙂".encode() * 4096)  # the first bytes that are looked at end in a character
    trained, validation = both(open_sharded(str(tmp_path)))
    assert "".join(trained + validation) == "a" + "🙂" * 4096
    with pytest.raises(UserError, match="cannot be read"):
        list(text_rows(tmp_path / "gone.txt", 0, 0, 1))


def test_a_twentieth_of_each_shards_rows_is_held_out(tmp_path):
    for n in range(4):
        write(tmp_path / f"{n}.parquet", [f"{n} {text}" for text in TEXTS])
    trained, validation = both(open_sharded(str(tmp_path)))
    assert not set(trained) & set(validation)
    assert sorted(trained + validation) == sorted(f"{n} {text}" for n in range(4) for text in TEXTS)
    assert 8 <= len(validation) <= 40
    assert {text[0] for text in validation} == set("0123")
    # They are taken from the shards in turn, not from the first alone.
    assert len({text[0] for text in validation[:4]}) == 4


def test_two_rows_fill_both_splits(tmp_path):
    trained, validation = both(open_sharded(str(write(tmp_path / "a.jsonl", TEXTS[:2]))))
    assert (trained, validation) == (TEXTS[:1], TEXTS[1:2])
    assert row_split(0) == "train"


def test_files_named_validation_are_held_out(tmp_path):
    write(tmp_path / "c4-train.0.jsonl.gz", TEXTS[:30])
    write(tmp_path / "c4-validation.0.jsonl.gz", TEXTS[30:40])
    assert both(open_sharded(str(tmp_path))) == (TEXTS[:30], TEXTS[30:40])


def test_texts_are_held_out_as_where_they_are_stored(tmp_path):
    for n in range(60):
        (tmp_path / f"{n}.txt").write_text(TEXTS[n])
    trained, validation = both(open_sharded(str(tmp_path)))
    assert sorted(trained + validation) == sorted(TEXTS[:60])
    corpus = prepare(str(tmp_path), vocab_size=300, seq_len=8)
    assert len(validation) == (corpus.validation == 0).sum()
    assert len(trained) == (corpus.train == 0).sum()


def test_of_one_text_the_end_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(prose(100_000))
    text = open_sharded(str(path))
    trained, validation = both(text)
    assert "".join(trained + validation) == path.read_text()
    assert 0.02 < len("".join(validation)) / path.stat().st_size < 0.1
    assert trained == [row.text for row in text.train[0].rows(0, 0, 1)]


def test_the_fingerprint_depends_on_content_not_on_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for n in range(3):
            write(tmp_path / folder / f"{n}.jsonl", TEXTS[n::3])
    first, moved = (open_sharded(f"{tmp_path}/{folder}").digest for folder in "ab")
    assert first == moved == open_sharded(f"{tmp_path}/a/*.jsonl").digest
    write(tmp_path / "b" / "2.jsonl", TEXTS)
    assert open_sharded(f"{tmp_path}/b").digest != first
    assert open_sharded(f"{tmp_path}/a/[01].jsonl").digest != first


def test_a_glob_names_files_stored_or_streamed(tmp_path):
    for name in ("x/train-0.parquet", "x/train-1.parquet", "y/train-2.parquet", "y/other.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [f"{name} {text}" for text in TEXTS[:30]])
    spec = f"{tmp_path}/**/train-*.parquet"
    text = open_sharded(spec)
    assert [Path(shard.name).name for shard in text.train] == [f"train-{n}.parquet" for n in range(3)]
    assert prepare(spec, vocab_size=300, seq_len=8).description.startswith(f"{spec}: 90 rows, ")
    (tmp_path / "x" / "a.txt").write_text(prose(300))
    (tmp_path / "y" / "a.txt").write_text(prose(500))
    assert prepare(f"{tmp_path}/*/a.txt", vocab_size=300, seq_len=8).description.startswith(
        f"{tmp_path}/*/a.txt: 2 fil"
    )
    assert len(open_sharded(f"{tmp_path}/*/a.txt").train) == 1


@pytest.mark.parametrize("use", [open_sharded, lambda spec: prepare(spec, vocab_size=300, seq_len=8)])
def test_a_spec_that_names_nothing_usable(tmp_path, use):
    write(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    for spec, message in [
        (f"{tmp_path}/*.parquet", "--data: no file matches"),
        (f"{tmp_path}/a.*", r"several kinds, .*a\.jsonl and .*a\.txt: give one kind"),
        (f"{tmp_path}/none", "is neither a file nor a folder here"),
    ]:
        with pytest.raises(UserError, match=message):
            use(spec)
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 text"):
        prepare(f"{tmp_path}/[b].txt", vocab_size=300, seq_len=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text"):
        use(f"{tmp_path}/empty")
