import json
from pathlib import Path

import pytest
from data_helpers import documents, prose

from fsam_core.errors import UserError
from fsam_trainers.data import documents as pieces
from fsam_trainers.data import prepare
from fsam_trainers.data.documents import file_digest
from fsam_trainers.data.hub import identity

TEXTS = [prose(30, seed) for seed in range(120)]


@pytest.fixture(autouse=True)
def _own_cache_for_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def write(folder: Path, **splits: list[str]) -> str:
    folder.mkdir()
    for name, texts in splits.items():
        lines = [json.dumps({"text": text, "url": str(n)}) for n, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return f"hf:{folder}"


def build(spec: str, max_tokens: int | None = 10**6):
    return prepare(spec, vocab_size=300, seq_len=8, max_tokens=max_tokens)


def test_a_data_sets_own_validation_split_is_used(tmp_path):
    corpus = build(write(tmp_path / "set", train=TEXTS[:100], validation=TEXTS[100:]))
    assert documents(corpus.train, corpus) == TEXTS[:100]
    assert documents(corpus.validation, corpus) == TEXTS[100:]
    assert corpus.description.startswith(f"{tmp_path / 'set'}: 120 rows, ")


def test_rows_are_held_out_where_there_is_none(tmp_path):
    corpus = build(write(tmp_path / "set", train=TEXTS))
    assert documents(corpus.train, corpus) == [t for n, t in enumerate(TEXTS) if pieces.row_split(n) == "train"]
    assert documents(corpus.validation, corpus) == [t for n, t in enumerate(TEXTS) if pieces.row_split(n) != "train"]


@pytest.mark.usefixtures("few_held_out")
def test_max_tokens_bounds_both_splits(tmp_path):
    corpus = build(write(tmp_path / "set", train=TEXTS[:100], validation=TEXTS[100:]), max_tokens=1000)
    assert (corpus.train.size, corpus.validation.size) == (1000, 50)


def test_a_changed_local_folder_is_another_corpus(tmp_path):
    spec = write(tmp_path / "set", train=TEXTS)
    first = build(spec)
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[5:]))
    assert build(spec).fingerprint != first.fingerprint


def test_c4_is_english_unless_it_says_otherwise():
    assert identity("hf:allenai/c4", file_digest) == identity("hf:allenai/c4:en", file_digest)
    assert identity("hf:allenai/c4", file_digest) != identity("hf:allenai/c4:de", file_digest)


def test_a_stream_without_a_bound_is_refused():
    with pytest.raises(
        UserError, match=r"--data hf:allenai/c4: to be stored, a data set of the hub needs --max-tokens N"
    ):
        build("hf:allenai/c4", max_tokens=None)


@pytest.mark.parametrize("spec", ["hf:", "hf::en"])
def test_a_name_is_needed(spec):
    with pytest.raises(UserError, match=f"--data {spec}: no data set named"):
        build(spec)


def test_a_data_set_that_does_not_fit_is_named(tmp_path, cache):
    spec = write(tmp_path / "untrained", test=TEXTS)
    with pytest.raises(UserError, match=f'--data {spec}: the data set has no "train" split, only: test'):
        build(spec)
    spec = write(tmp_path / "empty")
    with pytest.raises(UserError, match=f"--data {spec}: the data set cannot be opened: .+"):
        build(spec)
    spec = write(tmp_path / "columns", train=TEXTS)
    (tmp_path / "columns" / "train.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(
        UserError,
        match=f'--data: {spec}, shard 0, row 1: no "text", .* column, only: body, id: .*--text-column',
    ):
        build(spec)
    spec = write(tmp_path / "broken", train=TEXTS)
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(UserError, match=f"--data {spec}(, shard 0)?: the data set cannot be (read|opened): .+"):
        build(spec)
    assert not list(cache.iterdir())


def test_an_unreachable_hub_is_reported(child, tmp_path):
    code = """if True:
        import time
        time.sleep = lambda seconds: None  # the hub client waits longer and longer before it gives up
        from fsam_core.errors import UserError
        from fsam_trainers.data import load
        for bound in (1000, None):  # stored, streamed
            try:
                load("hf:nobody/nothing", vocab_size=300, seq_len=8, max_tokens=bound)
            except UserError as error:
                print(error)
        """
    out, err = child(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf")).communicate(timeout=60)
    lines = out.splitlines()
    assert len(lines) == 2, (out, err)
    assert all(line.startswith("--data hf:nobody/nothing: the data set cannot be opened: ") for line in lines), out
