"""Losses of models on held-out texts, with standard errors, also after their weights were rounded or given noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsam_core import UserError
from fsam_kernels.options import Loss
from fsam_trainers.data import load
from fsam_trainers.data.batches import targets_in, windows_of
from fsam_trainers.pretrained import Pretrained, inference, reading_of
from fsam_trainers.quantize import Weights, noisy, rounded


class Mean(NamedTuple):
    """A mean over the targets of windows and its standard error, None of a single window."""

    value: float
    error: float | None


class Change(NamedTuple):
    """What is done to the weights before they are evaluated: `draws` has a function for each random draw."""

    name: str
    draws: Sequence[Callable[[Weights], Weights]]


class Scores(NamedTuple):
    """Of N windows or images: how many targets each has, [N], and their mean loss, float64 [N].

    correct: float64 [N, K], 1 where an image's label is among the k likeliest, for each k of the model; K = 0 of texts.
    """

    targets: np.ndarray
    losses: np.ndarray
    correct: np.ndarray


class Sample(NamedTuple):
    """What a model reads of a text or a set of images. mark: what tells whether another model reads the same."""

    mark: bytes
    scores: Callable[[Weights], Scores]


def changes(bits: list[int], sigmas: list[float], draws: int) -> list[Change]:
    """None, then rounding to each number of bits, then each noise; noise is averaged over `draws` draws."""
    found = [Change("as trained", [lambda weights: weights])]
    found += [Change(f"{n} bits", [partial(rounded, bits=n)]) for n in bits]
    return found + [
        Change(f"noise {x:g}", [partial(noisy, sigma=x, seed=seed) for seed in range(draws)]) for x in sigmas
    ]


def held_out(
    found: Pretrained, spec: str, tokenizer: Path | None, seq_len: int, most: int, reading: Mapping[str, Any]
) -> np.ndarray:
    """The first windows of the held-out split of a text, in the model's tokens: int32 [at most `most`, seq_len + 1].

    Args:
        reading: of `reading_of`, so that a run's text is its own column.

    Raises:
        UserError: as `data.load`, and where the model's tokenizer is not known.
    """
    corpus = load(
        spec,
        vocab_size=found.config.vocab_size,
        seq_len=seq_len,
        tokenizer=found.tokenizer_for(spec, tokenizer, reading.get("text_column")),
        **reading,
    )
    count = min(most, (corpus.validation.size - 1) // seq_len)
    return windows_of(corpus.validation, np.arange(count), seq_len)


def evaluate(
    models: list[Pretrained],
    specs: list[str],
    changed: list[Change],
    *,
    framework: Callable[[Pretrained], str],
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    most: int = 256,
) -> Iterator[dict[str, Any]]:
    """A row for each model, change of its weights, and text.

    "difference" is to the first model after the same change: the mean of the windows' differences and its standard
    error, None for the first model, and where the two have other tokens.

    Args:
        seq_len: tokens a window; None for the smallest of the models', so that all see the same windows.
        most: windows a text.

    Raises:
        UserError: where a model or a text cannot be read, or a model is too short for the windows.
    """
    if other := next((found for found in models if found.config.FAMILY != "decoder"), None):
        raise UserError(f"{other.where} is a model of images, others are of text: give them to a command each")
    length = seq_len or min(found.config.seq_len for found in models)

    def read(found: Pretrained) -> dict[str, Sample]:
        if length > found.config.seq_len:
            raise UserError(f"--seq-len must be at most {found.config.seq_len}, that of {found.source}, got {length}")
        texts = {spec: held_out(found, spec, tokenizer, length, most, reading_of(models, spec)) for spec in specs}
        losses_of, loss = inference(framework(found)).window_losses, Loss(soft_cap=found.soft_cap or None)

        def scores(windows: np.ndarray, weights: Weights) -> Scores:
            targets_W = np.array([targets_in(window[None]) for window in windows])
            return Scores(targets_W, losses_of(found.config, weights, loss, windows), np.zeros((len(windows), 0)))

        return {spec: Sample(windows.tobytes(), partial(scores, windows)) for spec, windows in texts.items()}

    for row, _ in rows(models, changed, read):
        yield row


def rows(
    models: list[Pretrained], changed: list[Change], read: Callable[[Pretrained], dict[str, Sample]]
) -> Iterator[tuple[dict[str, Any], Scores]]:
    """A row for each model, change of its weights, and sample of `read(model)`, and the scores that it is made of."""
    first: dict[tuple[str, str], tuple[bytes, np.ndarray]] = {}
    for number, found in enumerate(models):
        samples, weights = read(found), found.weights()
        for change in changed:
            of_draws = [
                {spec: sample.scores(drawn) for spec, sample in samples.items()}
                for drawn in (draw(weights) for draw in change.draws)
            ]
            for spec, sample in samples.items():
                targets, losses, correct = zip(*(scores[spec] for scores in of_draws), strict=True)
                mean = Scores(targets[0], np.mean(losses, axis=0), np.mean(correct, axis=0))
                base = first.setdefault((change.name, spec), (sample.mark, mean.losses))
                difference_N = mean.losses - base[1] if number > 0 and base[0] == sample.mark else None
                yield row_of(found, change.name, spec, mean.targets, mean.losses, difference_N), mean


def mean_of(values_W: np.ndarray, targets_W: np.ndarray) -> Mean:
    """The mean over targets of independent windows, from each one's own, and its standard error, a ratio estimator's.

    targets_W: how many each window has. Where all have as many, both are those of the values alone.
    """
    count, total = len(values_W), max(int(targets_W.sum()), 1)
    mean = float(values_W @ targets_W) / total
    if count < 2:
        return Mean(mean, None)
    squares = np.square((values_W - mean) * targets_W).sum()
    return Mean(mean, math.sqrt(squares * count / (count - 1)) / total)


def row_of(
    found: Pretrained,
    change: str,
    spec: str,
    targets_W: np.ndarray,
    losses_W: np.ndarray,
    differences_W: np.ndarray | None,
) -> dict[str, Any]:
    """A row of `evaluate`, from each window's number of targets, mean loss, and difference to the first model's."""
    loss = mean_of(losses_W, targets_W)
    difference = None if differences_W is None else mean_of(differences_W, targets_W)
    perplexity = math.exp(loss.value) if loss.value < 700 else math.inf
    return {
        "model": found.source,
        "method": found.method,
        "steps": found.steps,
        "weights": change,
        "data": spec,
        "windows": len(losses_W),
        "tokens": int(targets_W.sum()),
        "loss": loss.value,
        "loss_error": loss.error,
        "perplexity": perplexity,
        "perplexity_error": None if loss.error is None else perplexity * loss.error,
        "difference": None if difference is None else difference.value,
        "difference_error": None if difference is None else difference.error,
    }
