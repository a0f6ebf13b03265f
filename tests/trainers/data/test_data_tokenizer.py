import json
import sys
from pathlib import Path

import pytest
import tokenizers
from data_helpers import documents, prose

from fsam_core.errors import UserError
from fsam_trainers.data import prepare
from fsam_trainers.data.vocabulary import load_tokenizer, train_tokenizer

TEXT = prose(3000)


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


def other_tokenizer(path: Path, end: str, ids: int = 300) -> Path:
    """A byte-level tokenizer of someone else's: its end token is the last id, and it truncates and pads."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=ids - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([end])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=20000)
    tokenizer.save(str(path))
    return path


def test_the_end_token_is_0_and_every_byte_has_a_token():
    content = train_tokenizer(["abab" * 20], 300)
    loaded = load_tokenizer(content, None, 300)
    assert loaded.end == 0
    assert 257 <= loaded.size <= 300
    text = "".join(map(chr, range(1, 0x300))) + "\U0001f600"
    (ids,) = loaded.encode_batch([text])
    assert tokenizers.Tokenizer.from_buffer(content).decode(ids) == text


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_a_given_tokenizer_is_used_whole(data, tmp_path, end):
    path = other_tokenizer(tmp_path / "t.json", end)
    corpus = prepare(data, vocab_size=300, seq_len=8, tokenizer=path)
    loaded = tokenizers.Tokenizer.from_file(str(path))
    assert corpus.train[-1] == corpus.validation[-1] == loaded.token_to_id(end)
    assert loaded.decode(corpus.train[:-1].tolist()) + loaded.decode(corpus.validation[:-1].tolist()) == TEXT
    assert (corpus.folder / "tokenizer.json").read_bytes() == path.read_bytes()


def test_the_tokenizers_content_makes_another_corpus(data, tmp_path):
    own = prepare(data, vocab_size=300, seq_len=8)
    given = prepare(data, vocab_size=300, seq_len=8, tokenizer=other_tokenizer(tmp_path / "t.json", "</s>"))
    other = prepare(data, vocab_size=300, seq_len=8, tokenizer=other_tokenizer(tmp_path / "t.json", "</s>", ids=290))
    assert len({own.folder, given.folder, other.folder}) == 3
    assert len({own.fingerprint, given.fingerprint, other.fingerprint}) == 3


def test_a_learned_tokenizer_reproduces_its_corpus(data):
    own = prepare(data, vocab_size=300, seq_len=8)
    again = prepare(data, vocab_size=300, seq_len=8, tokenizer=own.folder / "tokenizer.json")
    assert again.fingerprint == own.fingerprint
    assert documents(again.train, again) == documents(own.train, own)


def test_a_bad_tokenizer_is_named(data, tmp_path):
    def fails(path: Path, *parts: str, vocab_size: int = 300) -> None:
        with pytest.raises(UserError) as error:
            prepare(data, vocab_size=vocab_size, seq_len=8, tokenizer=path)
        assert all(part in str(error.value) for part in ["--tokenizer", path.name, *parts]), str(error.value)

    fails(tmp_path / "missing.json", "cannot be read")
    fails(tmp_path, "cannot be read")
    (tmp_path / "broken.json").write_text("{")
    fails(tmp_path / "broken.json", "not a tokenizer.json")
    fails(other_tokenizer(tmp_path / "large.json", "</s>"), "300", "299", "--vocab-size", vocab_size=299)
    fails(other_tokenizer(tmp_path / "endless.json", "[SEP]"), "end of a text", "</s>")


def test_ids_with_holes_count_by_the_largest(tmp_path):
    path = other_tokenizer(tmp_path / "t.json", "</s>", ids=280)
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    unused = next(
        token for token in vocabulary if len(token) > 1 and not any(token in m for m in content["model"]["merges"])
    )
    vocabulary[unused] = 900
    assert load_tokenizer(json.dumps(content).encode(), None, 1000).size == 901


def test_a_missing_package_names_the_command_that_installs_it(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"--data: tokenizers is not installed: pip install 'fsam\[text\]'"):
        prepare(data, vocab_size=300, seq_len=8)


def test_a_broken_package_is_told_from_a_missing_one(data, tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text("raise OSError('libprotobuf.so')")
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "t.model").write_bytes(b"\n\n")
    with pytest.raises(
        UserError, match=r"--data: sentencepiece is installed but cannot be imported \(OSError: libprot"
    ):
        prepare(data, vocab_size=300, seq_len=8, tokenizer=tmp_path / "t.model")
