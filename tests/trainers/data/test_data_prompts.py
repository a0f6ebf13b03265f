"""Rows of a prompt and an answer: the prompt is context, the loss a mean over the answers' tokens."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import documents
from tokenizers import Tokenizer, models, pre_tokenizers

from fsam_core import FunctionalSAM, MicroBatches, Plain
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_core.errors import UserError
from fsam_trainers.data import Corpus, StreamedCorpus, load, prepare, training_batches
from fsam_trainers.data.documents import row_split
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.flax_decoder import flattened
from fsam_trainers.models.layout import ModelConfig, blocks

ROWS = [("a b", "c"), ("d", "a a"), ("", "e"), ("b c", ""), ("e e e", "d c b a")]
WORDS = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
TOKENS = [[~1, ~2, 3, 0], [~4, 1, 1, 0], [5, 0], [~2, ~3, 0], [~5, ~5, ~5, 4, 3, 2, 1, 0]]
TRAIN, VALIDATION = (
    [token for n, row in enumerate(TOKENS) if row_split(n) == split for token in row]
    for split in ("train", "validation")
)


def lines(rows: list[tuple[str | None, str]], names: tuple[str, str] = ("prompt", "answer")) -> bytes:
    return "".join(
        json.dumps({"id": n, **dict(zip(names, row, strict=True))}) + "\n" for n, row in enumerate(rows)
    ).encode()


def parquet(rows: list[tuple[str, str]]) -> bytes:
    file = io.BytesIO()
    prompts, answers = zip(*rows, strict=True)
    pq.write_table(pa.table({"answer": answers, "id": range(len(rows)), "prompt": prompts}), file, row_group_size=2)
    return file.getvalue()


@pytest.fixture
def words(tmp_path) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def both(spec: str, tokenizer: Path, workers: int = 0, **more) -> tuple[Corpus, StreamedCorpus]:
    more |= {"vocab_size": 6, "seq_len": 3, "tokenizer": tokenizer}
    stored = prepare(spec, **more)
    streamed = load(spec, stream="yes", buffer=1, workers=workers, **more)
    assert isinstance(streamed, StreamedCorpus)
    return stored, streamed


def in_order(corpus: StreamedCorpus, count: int) -> list[int]:
    """The first tokens of a stream whose buffer is one window."""
    batches = training_batches(corpus, 3, 1, 0)
    found = np.concatenate([batches.at(step)[0, :-1] for step in range(count // 3 + 1)])
    batches.close()
    return found[:count].tolist()


FILES = {
    "a.jsonl": lines(ROWS),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "a.json": lines(ROWS),
    "a.txt": lines(ROWS),
    "a.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("name", [*FILES, "hub"])
def test_prompts_are_context_stored_and_streamed(tmp_path, monkeypatch, words, name):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / ("train.jsonl" if name == "hub" else name)
    path.write_bytes(FILES.get(name, FILES["a.jsonl"]))
    spec, more = (f"hf:{folder}", {"max_tokens": 1000}) if name == "hub" else (str(path), {})
    stored = prepare(spec, vocab_size=6, seq_len=3, tokenizer=words, **more)
    assert stored.train.tolist() == TRAIN
    assert stored.validation.tolist() == VALIDATION
    assert stored.train.dtype == stored.validation.dtype == np.int32
    assert ": 5 prompts with answers, " in stored.description
    for workers in (0, 1) if name == "a.jsonl" else (0,):
        streamed = load(spec, stream="yes", vocab_size=6, seq_len=3, tokenizer=words, buffer=1, workers=workers)
        assert streamed.validation.tolist() == stored.validation.tolist()
        assert in_order(streamed, stored.train.size) == stored.train.tolist()


def test_a_stream_resumes_within_a_prompt(tmp_path, words):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    _, corpus = both(str(tmp_path / "a.jsonl"), words)
    whole = training_batches(corpus, 3, 1, 0)
    steps = [(whole.state(n), whole.at(n)) for n in range(12)]
    assert any((batch[0, 0] < 0) and state["parts"]["0"]["token"] for state, batch in steps)
    for n, (state, batch) in enumerate(steps):
        resumed = training_batches(corpus, 3, 1, 0)
        resumed.restore(state)
        np.testing.assert_array_equal(resumed.at(n), batch)


def test_texts_keep_a_narrow_type_without_prompts(tmp_path, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a b c d e"}\n' * 4)
    assert prepare(str(tmp_path / "a.jsonl"), vocab_size=6, seq_len=3, tokenizer=words).train.dtype == np.uint16


def test_a_vocabulary_is_learned_from_prompts_and_answers(tmp_path):
    rows = [(f"Question {n}: wozu?\n", f"Antwort {n}.") for n in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    corpus = prepare(str(tmp_path / "a.jsonl"), vocab_size=300, seq_len=8)
    plain = np.where(corpus.train < 0, ~corpus.train, corpus.train)
    assert documents(plain, corpus) == ["".join(row) for n, row in enumerate(rows) if row_split(n) == "train"]
    assert (corpus.train < 0).sum() < len(rows) * 12  # "Question " is no nine bytes any more


def test_no_space_is_put_between_prompt_and_answer(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "▁a": 1, "b": 2, "▁b": 3, "\n": 4, "▁": 5, "a": 6}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_bytes(lines([("a", "b")] * 4))
    corpus = prepare(str(tmp_path / "a.jsonl"), vocab_size=7, seq_len=2, tokenizer=tmp_path / "t.json")
    assert corpus.train[:3].tolist() == [~1, 2, 0]


def test_the_columns_can_be_named(tmp_path, words):
    rows = "".join(json.dumps({"text": "e", "question": q, "reply": a}) + "\n" for q, a in ROWS)
    (tmp_path / "a.jsonl").write_text(rows)
    stored, streamed = both(str(tmp_path / "a.jsonl"), words, text_column="question,reply")
    assert stored.train.tolist() == in_order(streamed, stored.train.size) == TRAIN


def stream_to_the_end(spec: str, **more) -> None:
    in_order(load(spec, stream="yes", buffer=1, workers=0, **more), 100)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b'{"prompt": "a", "id": 1}\n', {}, 'line 1: no "text", .* or "prompt" with "answer" column, only: prompt, id'),
        (b'{"answer": "a", "id": 1}\n', {}, 'line 1: no "text", .* or "prompt" with "answer" column, only: answer, id'),
        (
            b'{"prompt": "a", "answer": "b", "text": "a b"}\n',
            {},
            'line 1: "text" beside "prompt" with "answer": .* --text-column text or prompt,answer',
        ),
        (lines([(None, "a")]), {}, 'line 1: "prompt" must be a string, got NoneType'),
        (lines(ROWS) + b'{"text": "a"}\n' * 11, {}, 'line 6: no "prompt" with "answer" column, only: text'),
        (
            b'{"text": "a"}\n' * 5 + lines(ROWS * 3),
            {},
            'line 6: no "text" or "content" column, only: id, prompt, answer',
        ),
        (lines(ROWS), {"text_column": "prompt,reply"}, 'no "prompt" with "reply" column, only: id, prompt, answer'),
        (lines(ROWS), {"text_column": "a,b,c"}, "--text-column: got 'a,b,c', give a name"),
        (lines(ROWS), {"text_column": "prompt,"}, "--text-column: got 'prompt,', give a name"),
    ],
)
def test_rows_that_are_not_clear_are_refused(tmp_path, words, content, more, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    more |= {"vocab_size": 6, "seq_len": 3, "tokenizer": words}
    with pytest.raises(UserError, match=message) as error:
        prepare(str(tmp_path / "a.jsonl"), **more)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        stream_to_the_end(str(tmp_path / "a.jsonl"), **more)


CONFIG = ModelConfig(layers=2, width=12, heads=3, seq_len=7, vocab_size=19)
DRAW = np.random.default_rng(0).integers(0, 19, (2, 3, 8)).astype(np.int32)
PROMPTS = np.array([[1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1], [1] * 8], bool)
MIXED = np.where(PROMPTS, ~DRAW[0], DRAW[0])
ONLY = ~DRAW[1]


def by_hand() -> float:
    """The mean over the answers' tokens alone, of the model on the plain ids of `MIXED`."""
    params = flax_decoder.parameters(CONFIG, 0)
    h_NxD, w_VxD = flax_decoder.Decoder(CONFIG).apply({"params": params}, DRAW[0][:, :-1])
    logp_BxLxV = jax.nn.log_softmax(h_NxD @ w_VxD.T).reshape(3, 7, 19)
    targets = [(b, n, DRAW[0][b, n + 1]) for b in range(3) for n in range(7) if not PROMPTS[b, n + 1]]
    assert len(targets) == 4
    return -float(np.mean([logp_BxLxV[at] for at in targets]))


def jax_step(batches: list[np.ndarray], method, staged: bool) -> tuple[float, dict[str, np.ndarray]]:
    model = flax_decoder.Decoder(CONFIG)
    features = flax_decoder.staged(model, 1) if staged else lambda p, b: flax_decoder.features(model, p, b)
    call = jax.jit(in_jax.value_and_grad(features, method, blocks=blocks(CONFIG)))
    parts = MicroBatches({"tokens": jnp.asarray(x)} for x in batches)
    (loss, info), grads = call(flax_decoder.parameters(CONFIG, 0), parts)[:2]
    assert bool(info.finite)
    return float(loss), {name: np.asarray(x) for name, x in flattened(grads).items()}


def torch_step(batches: list[np.ndarray], method, staged: bool) -> tuple[float, dict[str, np.ndarray]]:
    model = torch_decoder.Decoder(CONFIG, 0)
    features = torch_decoder.staged(1) if staged else torch_decoder.features
    step = in_torch.Step(model, torch.optim.AdamW(model.parameters()), method, features=features, blocks=blocks(CONFIG))
    loss = step.gradient(MicroBatches(torch.from_numpy(x).long() for x in batches))
    return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("batches", "method", "staged"),
    [
        ([MIXED], Plain(), False),
        ([ONLY, MIXED], FunctionalSAM(0.1), False),
        ([ONLY, MIXED], FunctionalSAM(0.1, scope="top:1"), True),
    ],
    ids=["plain", "beside prompts only", "staged"],
)
def test_the_loss_is_a_mean_over_answers_in_both(batches, method, staged):
    loss, grads = jax_step(batches, method, staged)
    other, found = torch_step(batches, method, staged)
    assert loss == pytest.approx(by_hand(), rel=1e-5)
    assert other == pytest.approx(loss, rel=1e-5)
    for name, g in grads.items():
        np.testing.assert_allclose(found[name], g, rtol=1e-3, atol=1e-5 * np.abs(g).max(), err_msg=name)


@pytest.mark.parametrize("step", [jax_step, torch_step])
def test_prompts_alone_are_no_error_and_no_step(step):
    loss, grads = step([ONLY], FunctionalSAM(0.1), False)
    assert loss == 0
    assert not any(g.any() for g in grads.values())
