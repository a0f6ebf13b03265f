"""What the models of a comparison write: one held-out prompt, continued before training and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fsam_trainers import generate, pretrained
from fsam_trainers.config import Settings
from fsam_trainers.data import AnyCorpus, ImageCorpus
from fsam_trainers.data.pipeline import given_tokenizer

PROMPT, ADDED = 24, 48  # tokens
MOST = 4  # models, the untrained one included: JAX compiles for each


def written(settings: Settings, corpus: AnyCorpus, runs: Mapping[str, Path]) -> dict[str, str]:
    """Whose text -> text: the prompt, its continuation by the initial weights, and by each run.

    Args:
        settings: of one of the runs; only the initial weights depend on it.
        runs: name -> folder.

    Returns:
        {} for data without a tokenizer, images among them.
    """
    if isinstance(corpus, ImageCorpus):
        return {}
    found = {name: pretrained.find(str(folder), "--out") for name, folder in runs.items()}
    tokenizer = next((one.tokenizer for one in found.values() if one.tokenizer), None)
    if tokenizer is None:
        return {}
    _, vocabulary = given_tokenizer(tokenizer, settings.model.vocab_size)
    assert vocabulary is not None
    size, end, decode = vocabulary.size, vocabulary.end, generate.decoder(tokenizer)
    first = corpus.validation[np.arange(min(PROMPT, settings.model.seq_len, corpus.validation.size))]
    first = np.where(first < 0, ~first, first)  # context
    prompt = [int(token) for token in first if token != end] or [end]
    weights: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "before training": partial(pretrained.initial_weights, settings),
        **{name: one.weights for name, one in found.items()},
    }
    inference = pretrained.inference(settings.framework)
    texts = {"prompt": decode(prompt)}
    for name, read in list(weights.items())[:MOST]:
        model = inference.CachedDecoder(settings.model, read())
        choose = generate.chooser(size, temperature=0.8, top_k=50, seed=0, soft_cap=settings.soft_cap)
        texts[name] = decode(list(generate.generate(model, prompt, ADDED, choose, end)))
    return texts
