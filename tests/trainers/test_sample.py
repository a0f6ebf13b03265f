"""`fsam sample`: the cache changes nothing, both frameworks and transformers agree, draws follow their options."""

import numpy as np
import pytest
import torch
import transformers
from small_runs import fsam
from trained_runs import FRAMEWORKS, logits, random_model, runs, saved  # noqa: F401

from fsam_trainers.generate import chooser, generate
from fsam_trainers.pretrained import inference

LLAMA = {"rms_norm": True, "rotary": True, "swiglu": True, "qkv_biases": True, "qk_norm": True}
KINDS = pytest.mark.parametrize(
    "changes",
    [{}, {"tied": False}, {"biases": True, "norm_eps": 1e-5}, LLAMA, {**LLAMA, "kv_heads": 1}],
    ids=["plain", "untied", "biases", "llama", "grouped"],
)
greedy = chooser(31, temperature=0, top_k=None, seed=0)


def cached(framework, **changes):
    return inference(framework).CachedDecoder(*random_model(**changes))


@KINDS
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_cache_gives_the_logits_of_the_whole_text(framework, changes):
    tokens = np.random.default_rng(0).integers(0, 31, (1, 9))
    expected = logits(framework, *random_model(**changes), tokens)[0]
    model = cached(framework, **changes)
    for begin in (4, 1):  # the second text must not see the first
        found = [model.start(tokens[0, :begin].tolist()), *(model.advance(int(token)) for token in tokens[0, begin:])]
        np.testing.assert_allclose(found, expected[begin - 1 :], rtol=1e-4, atol=1e-5)


def test_both_frameworks_give_the_same_greedy_text_past_the_context():
    texts = [list(generate(cached(framework), [3, 1, 4], 40, greedy, end=-1)) for framework in FRAMEWORKS]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40
    assert len(set(texts[0])) > 3


@pytest.mark.parametrize("prompt", [[5], list(range(9)), list(range(25))], ids=len)
def test_a_full_context_begins_again_with_its_last_half(prompt):
    """Without a cache: what the model reads is a function of the text so far."""
    config, weights = random_model()
    text, start = list(prompt), 0 if len(prompt) <= 9 else len(prompt) - 4
    for _ in range(20):
        if len(text) - start > 9:
            start = len(text) - 4
        text.append(int(logits("torch", config, weights, np.array([text[start:]]))[0, -1].argmax()))
    assert list(generate(cached("torch"), prompt, 20, greedy, end=-1)) == text[len(prompt) :]


def test_the_end_of_a_document_ends_the_text():
    whole = list(generate(cached("torch"), [3, 1, 4], 20, greedy, end=-1))
    end = whole[5]
    assert list(generate(cached("torch"), [3, 1, 4], 20, greedy, end=end)) == whole[: whole.index(end)]


def test_draws_follow_the_softmax_of_the_temperature():
    z = np.log([0.5, 0.3, 0.2, 1e9])  # the last is no token of the tokenizer
    for temperature, expected in ((1.0, [0.5, 0.3, 0.2]), (0.5, np.square([0.5, 0.3, 0.2]) / 0.38)):
        choose = chooser(3, temperature=temperature, top_k=None, seed=1)
        drawn = np.bincount([choose(z) for _ in range(4000)], minlength=3) / 4000
        np.testing.assert_allclose(drawn, expected, atol=0.04)


def test_top_k_draws_among_the_likeliest():
    choose = chooser(5, temperature=100.0, top_k=2, seed=0)
    assert {choose(np.array([1.0, 5.0, 2.0, 7.0, 0.0])) for _ in range(200)} == {1, 3}


def test_a_soft_cap_is_part_of_the_model():
    choose = chooser(2, temperature=1.0, top_k=None, seed=0, soft_cap=1e-3)
    assert 0.4 < np.mean([choose(np.array([50.0, -50.0])) for _ in range(500)]) < 0.6


def sampled(capsys, *arguments) -> str:
    assert fsam("sample", *arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_continues_a_prompt_as_transformers_does(framework, runs, tmp_path, capsys):  # noqa: F811
    assert fsam("export", runs[framework], "--to", "hf", "--out", tmp_path / "hf") == 0
    capsys.readouterr()
    text = sampled(capsys, runs[framework], "--prompt", "def f", "--temperature", 0, "--tokens", 8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([tokenizer("def f")["input_ids"]])
    assert text == tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]) + "\n"
    assert text.startswith("def f")
    other = ({*FRAMEWORKS} - {framework}).pop()
    more = ("--prompt", "def f", "--temperature", 0, "--tokens", 8)
    assert sampled(capsys, runs[framework], *more, "--framework", other) == text


def test_seeds_give_other_texts_and_the_same_again(runs, capsys):  # noqa: F811
    one, again, other = (sampled(capsys, runs["torch"], "--tokens", 30, "--seed", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tokens", 0), "--tokens must be at least 1, got 0"),
        (("--temperature", -1), "--temperature must be a finite number >= 0, got -1.0"),
        (("--top-k", 0), "--top-k must be at least 1, got 0"),
        (("--seed", -1), "--seed must be between 0 and 2**32 - 1, got -1"),
        ((), "has no tokenizer.json or tokenizer.model beside its weights; give --tokenizer FILE"),
    ],
)
def test_wrong_options_are_one_sentence(more, says, tmp_path, capsys):
    assert fsam("sample", saved(tmp_path / "model"), *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
