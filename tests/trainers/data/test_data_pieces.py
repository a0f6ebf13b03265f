"""A document has the same tokens whole and in pieces, stored and streamed, whatever a tokenizer puts before it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from data_helpers import prose
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fsam_core.errors import UserError
from fsam_trainers.data import StreamedCorpus, load, prepare, text, training_batches
from fsam_trainers.data.text import text_rows
from fsam_trainers.data.vocabulary import load_tokenizer

# White space before and after line ends, which tokenizers join in different ways.
BOOK = "\n".join(f"{prose(7, n)}\n  indented {n}{chr(10) * (2 + n % 2)}a short\nline" for n in range(300))


def json_tokenizer(kind: str) -> bytes:
    """A tokenizer.json: byte-level with a space before a text or without, or of Llama's two forms."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=kind.startswith("llama"), unk_token="<unk>"))
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "llama, old":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if "llama" in kind or kind == "words" else pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<unk>"]
    lines = BOOK.splitlines() if not alphabet else [BOOK]  # no token that crosses a line end
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=[*alphabet, "\n"], show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str().encode()


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BOOK.splitlines()), model_writer=model, vocab_size=350, minloglevel=2, **options
    )
    return model.getvalue()


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
MAKERS = {
    **{
        kind: (lambda kind=kind: json_tokenizer(kind))
        for kind in ("plain", "prefix space", "llama", "llama, old", "words")
    },
    "SentencePiece": sentencepiece_model,
    "SentencePiece like Llama's": lambda: sentencepiece_model(**LLAMA),
    "SentencePiece without a prefix": lambda: sentencepiece_model(**LLAMA, add_dummy_prefix=False),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_document_has_the_same_tokens_whole_and_in_pieces(tmp_path, monkeypatch, kind):
    content = MAKERS[kind]()
    suffix = "json" if content.startswith(b"{") else "model"
    (tmp_path / f"t.{suffix}").write_bytes(content)
    (tmp_path / "a.txt").write_text(BOOK)
    monkeypatch.setattr(text, "PIECE", 1000)
    monkeypatch.setattr(text, "REACH", 300)
    tokenizer = load_tokenizer(content, None, 1000)
    cut = text.held_out_from(tmp_path / "a.txt")
    rows = list(text_rows(tmp_path / "a.txt", 0, 0, 1, end=cut))
    assert len(rows) > 5
    (whole,) = tokenizer.encode_batch([BOOK.encode()[:cut].decode()])
    stored = prepare(str(tmp_path / "a.txt"), vocab_size=1000, seq_len=8, tokenizer=tmp_path / f"t.{suffix}")
    assert stored.train.tolist() == [*whole, tokenizer.end]
    for workers in (0, 1) if kind in ("llama", "SentencePiece like Llama's") else (0,):
        more = {"tokenizer": tmp_path / f"t.{suffix}", "buffer": 1, "workers": workers}
        streamed = load(str(tmp_path / "a.txt"), stream="yes", vocab_size=1000, seq_len=8, **more)
        assert isinstance(streamed, StreamedCorpus)
        np.testing.assert_array_equal(streamed.validation, stored.validation)
        batches = training_batches(streamed, 8, 1, 0)
        steps = stored.train.size // 8
        flat = np.concatenate([batches.at(step)[0, :-1] for step in range(steps)])
        batches.close()
        np.testing.assert_array_equal(flat, stored.train[: steps * 8])


def test_sentencepiece_ids_are_those_of_its_own_library(tmp_path):
    (tmp_path / "t.model").write_bytes(content := sentencepiece_model())
    texts = [prose(30, seed) + " </s> <s>" for seed in range(2)]
    for n, content_of in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(content_of)
    corpus = prepare(f"{tmp_path}/*.txt", vocab_size=400, seq_len=8, tokenizer=tmp_path / "t.model")
    own = sentencepiece.SentencePieceProcessor(model_proto=content)
    wanted = [[*own.encode(one), own.eos_id()] for one in texts]
    assert sorted([corpus.train.tolist(), corpus.validation.tolist()]) == sorted(wanted)
    assert (corpus.folder / "tokenizer.model").read_bytes() == content
    again = prepare(f"{tmp_path}/*.txt", vocab_size=400, seq_len=8, tokenizer=tmp_path / "t.model")
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: b"", ["neither a tokenizer.json nor a SentencePiece model", "empty"]),
        (lambda: b"IQ== 0\nIg== 1\n", ["neither a tokenizer.json nor a SentencePiece model"]),
        (lambda: sentencepiece_model(eos_id=-1), ["no token for the end of a text", "eos_id"]),
        (sentencepiece_model, ["has 350 tokens, --vocab-size is 300: it must be at least 350"]),
    ],
)
def test_a_model_that_cannot_be_used_is_named(tmp_path, make, parts):
    path: Path = tmp_path / "t.model"
    path.write_bytes(make())
    (tmp_path / "a.txt").write_text(BOOK)
    with pytest.raises(UserError) as error:
        prepare(str(tmp_path / "a.txt"), vocab_size=300, seq_len=8, tokenizer=path)
    assert all(part in str(error.value) for part in ["--tokenizer", "t.model", *parts]), str(error.value)
    assert "\n" not in str(error.value)
