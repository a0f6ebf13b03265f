"""Batches of images: their order, their draws, mixtures, and an evaluation over all of a split."""

from __future__ import annotations

import numpy as np
import pytest

from fsam_core import UserError
from fsam_trainers.data.batches import micro_batches_of, rows_of, targets_in
from fsam_trainers.data.images import Augmentation, HeldOut, ImageBatches
from fsam_trainers.data.images.sources import Stored

RANDOM = np.random.default_rng(0)
# The first pixel of an image is its number.
PIXELS = RANDOM.integers(1, 256, (23, 6, 4, 3), dtype=np.uint8)
PIXELS[:, 0, 0, 0] = np.arange(23)
SOURCE = Stored(PIXELS, (np.arange(23) % 3).astype(np.int32))
ALL = Augmentation(crop_padding=2, flip=True, mixup=0.3)


def batches(augmentation: Augmentation = Augmentation(), batch: int = 6, seed: int = 0, **share) -> ImageBatches:  # noqa: B008
    return ImageBatches(SOURCE, augmentation, batch, seed, **share)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_every_epoch_has_every_image_once_with_its_label():
    found = batches()
    seen = [batch for step in range(23) for batch in [found.at(step)]]  # six epochs
    numbers = np.concatenate([x["pixels"][:, 0, 0, 0] for x in seen])
    assert all(sorted(epoch) == list(range(23)) for epoch in numbers.reshape(6, 23))
    np.testing.assert_array_equal(np.concatenate([x["labels"][:, 0] for x in seen]), numbers % 3)
    assert seen[0]["pixels"].dtype == np.uint8
    assert (seen[0]["weights"] == 1).all()


def test_a_step_is_a_pure_function_of_seed_and_step():
    one, other = batches(ALL, seed=3), batches(ALL, seed=3)
    for step in (17, 0, 5, 17):  # not in order: nothing is remembered
        assert same(one.at(step), other.at(step))
    assert not same(one.at(5), one.at(6))
    assert not same(batches(ALL, seed=4).at(5), one.at(5))


@pytest.mark.parametrize("augmentation", [Augmentation(), ALL], ids=["plain", "all"])
@pytest.mark.parametrize(("batch", "ranks", "micro"), [(12, 3, 2), (6, 2, 1), (3, 3, 1)])
def test_ranks_have_their_parts_of_each_micro_batch(augmentation, batch, ranks, micro):
    whole = batches(augmentation, batch)
    of = [batches(augmentation, batch, rank=rank, ranks=ranks, micro_batches=micro) for rank in range(ranks)]
    for step in (0, 4):
        parts = [micro_batches_of(one.at(step), micro) for one in of]
        for m, expected in enumerate(micro_batches_of(whole.at(step), micro)):
            assert same({k: np.concatenate([rank[m][k] for rank in parts]) for k in expected}, expected)


def test_a_crop_is_a_window_of_the_image_padded_with_black():
    found = batches(Augmentation(crop_padding=2), batch=23).at(0)
    plain = batches(batch=23).at(0)
    offsets = set()
    for crop, image in zip(found["pixels"], plain["pixels"], strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        fits = [(i, j) for i in range(5) for j in range(5) if np.array_equal(padded[i : i + 6, j : j + 4], crop)]
        assert len(fits) == 1
        offsets.add(fits[0])
    assert len(offsets) > 10


def test_about_half_of_the_images_are_mirrored():
    found, plain = batches(Augmentation(flip=True), batch=230).at(0)["pixels"], batches(batch=230).at(0)["pixels"]
    mirrored = (found == plain[:, :, ::-1]).all((1, 2, 3))
    assert ((found == plain).all((1, 2, 3)) | mirrored).all()
    assert 80 < mirrored.sum() < 150


@pytest.mark.parametrize("batch", [6, 7])
def test_mixup_is_two_weighted_labels_of_neighbours(batch):
    mixed, plain = batches(Augmentation(mixup=0.5), batch).at(2), batches(batch=batch).at(2)
    partner = np.minimum(np.arange(batch) ^ 1, batch - 1)
    share = mixed["weights"][:, 0, None, None, None]
    np.testing.assert_allclose(mixed["weights"].sum(1), 1, rtol=1e-6)
    assert len(np.unique(mixed["weights"])) > batch
    np.testing.assert_array_equal(mixed["labels"], np.stack([plain["labels"][:, 0], plain["labels"][partner, 0]], 1))
    expected = share * plain["pixels"] + (1 - share) * plain["pixels"][partner]
    np.testing.assert_allclose(mixed["pixels"], expected, atol=0.5 + 1e-4)
    assert targets_in(mixed) == pytest.approx(batch)


class Damaged(Stored):
    def pixels(self, numbers):
        pixels, usable = super().pixels(numbers)
        return pixels, usable & (numbers != 7)


def test_an_image_that_cannot_be_used_is_no_target():
    source = Damaged(SOURCE.array, SOURCE.labels)
    held_out = list(HeldOut(source, 5))
    assert [rows_of(x) for x in held_out] == [5, 5, 5, 5, 3]
    assert [int(x["labels"].min()) for x in held_out] == [0, -1, 0, 0, 0]
    assert sum(targets_in(x) for x in held_out) == 22
    mixed = ImageBatches(source, Augmentation(mixup=1.0), 23, 0).at(0)
    assert (mixed["labels"] < 0).sum(0).tolist() == [1, 1]  # its own row's, and that of its partner


def test_a_held_out_split_is_read_by_index():
    held_out = HeldOut(SOURCE, 10)
    assert len(held_out) == 3
    assert [rows_of(x) for x in held_out[1:]] == [10, 3]
    np.testing.assert_array_equal(held_out[2]["pixels"], PIXELS[20:])
    with pytest.raises(IndexError):
        held_out[3]


def test_a_stream_of_text_is_not_resumed_as_images():
    found = batches()
    found.restore(found.state(3))
    with pytest.raises(UserError, match="stream of text"):
        found.restore({"index": 3})
    found.close()
    with pytest.raises(UserError, match="--batch 6 must be divisible by --micro-batches 4"):
        batches(micro_batches=4)
