"""Losses and accuracies of Vision Transformers on held-out images, as `evaluation` has losses of decoders on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from fsam_core import UserError
from fsam_trainers.data.images import HeldOut, ImageCorpus, load
from fsam_trainers.evaluation import Change, Sample, Scores, mean_of, rows
from fsam_trainers.models.vit_layout import ViTConfig
from fsam_trainers.pretrained import Pretrained, inference
from fsam_trainers.quantize import Weights

BATCH = 256  # images whose logits are computed together


def evaluate(
    models: list[Pretrained],
    specs: list[str],
    changed: list[Change],
    *,
    framework: Callable[[Pretrained], str],
    most: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each model, change of its weights, and set of images, as `evaluation.evaluate` gives them.

    In addition each has "val_accuracy", its standard error "val_accuracy_error", and "val_top5" as a run has it.

    Args:
        most: images of a set; None for all.

    Raises:
        UserError: where a model or a set cannot be read, or the images are not such as the model was trained on.
    """

    def read(found: Pretrained) -> dict[str, Sample]:
        sets = {spec: held_out(spec, found, most) for spec in specs}
        scores = partial(_scores, inference(framework(found)).image_logits, _config_of(found))
        return {spec: Sample(digest, partial(scores, batches)) for spec, (batches, digest) in sets.items()}

    for row, scores in rows(models, changed, read):
        accuracy, *top5 = (mean_of(column, scores.targets) for column in scores.correct.T)
        row |= {"val_accuracy": accuracy.value, "val_accuracy_error": accuracy.error}
        yield row | ({"val_top5": top5[0].value} if top5 else {})


def _config_of(found: Pretrained) -> ViTConfig:
    if not isinstance(found.config, ViTConfig):
        raise UserError(f"{found.where} is a model of text, others are of images: give them to a command each")
    return found.config


def held_out(spec: str, found: Pretrained, most: int | None) -> tuple[HeldOut, bytes]:
    """(the held-out images of a set, at most so many, for this model; what identifies them).

    Raises:
        UserError: for a model of text, a set that cannot be read, and images that are not such as the model was trained
            on.
    """
    config = _config_of(found)
    images: ImageCorpus = load(spec, image_size=config.height if _is_resized(spec, config) else None)
    got = (images.height, images.width, images.channels, len(images.classes))
    want = (config.height, config.image_width, config.channels, config.classes)
    if got != want:
        shown = ["{} x {} x {} in {} classes".format(*each) for each in (got, want)]
        raise UserError(f"--data: the images of {spec} are {shown[0]}, and {found.source} was trained on {shown[1]}")
    source = images.validation
    if most is not None:
        source = source.part(np.arange(min(most, len(source.labels))))
    return HeldOut(source, BATCH), source.digest()


def _is_resized(spec: str, config: ViTConfig) -> bool:
    """Whether the images may have other sizes than the model's: those of files."""
    return spec not in ("digits", "fashion") and config.height == config.image_width


def _scores(
    logits_at: Callable[..., Any], config: ViTConfig, batches: Sequence[dict[str, np.ndarray]], weights: Weights
) -> Scores:
    logits = logits_at(config, weights)
    losses, correct = [], []
    for batch in batches:
        labels_N = batch["labels"][:, 0]
        z_NxV = logits(batch["pixels"]).astype(np.float64)[labels_N >= 0]
        own_N = z_NxV[np.arange(len(z_NxV)), labels_N[labels_N >= 0]]
        top_N = z_NxV.max(1)
        losses.append(top_N + np.log(np.exp(z_NxV - top_N[:, None]).sum(1)) - own_N)
        above_N = (z_NxV > own_N[:, None]).sum(1)
        correct.append(np.stack([above_N < k for k in config.top], axis=1))
    losses_N = np.concatenate(losses)
    return Scores(np.ones(len(losses_N)), losses_N, np.concatenate(correct).astype(np.float64))
