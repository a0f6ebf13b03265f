"""`load`: the images of a SPEC in training and validation splits, all of one size."""

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsam_core.errors import UserError, one_line
from fsam_trainers.data.batches import permutation
from fsam_trainers.data.corpus import check_at_least
from fsam_trainers.data.images import arrays, files
from fsam_trainers.data.images.augmentation import Augmentation
from fsam_trainers.data.images.decoding import GREY, Form, opened
from fsam_trainers.data.images.sources import Decoders, Encoded, Source, Stored
from fsam_trainers.data.specs import is_hub, path_of
from fsam_trainers.data.worker_process import count_for

HELD_OUT = 10  # one image in this many is held out where a set has no validation split
PROBED = 64  # images whose size is looked at before a run
_SPLIT = 2  # of the draws of seed 0: which one is for the split (0: the order of batches, 1: augmentation)
WHAT_WORKS = (
    "digits, fashion, a folder of class/*.png or .jpg, of IDX files, or of CIFAR's binary files, an .npz, a .parquet "
    "file or folder, or hf:NAME[:CONFIG]"
)


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """Images in two splits, as a run takes them.

    classes: their names, or numbers. fingerprint: of images, labels, split and augmentation. folder: where a corpus has
    its tokenizer, and this has none. description: one line for a person.
    """

    train: Source
    validation: Source
    height: int
    width: int
    channels: int
    classes: tuple[str, ...]
    augmentation: Augmentation
    fingerprint: str
    folder: Path
    description: str


def load(
    spec: str,
    *,
    image_size: int | None = None,
    augmentation: Augmentation | None = None,
    workers: int | None = None,
) -> ImageCorpus:
    """The images that `spec` names.

    Args:
        spec: see WHAT_WORKS.
        image_size: pixels of both sides that encoded images are scaled and cropped to; None for the size they all have.
        augmentation: of the training images.
        workers: decoding processes; None for one fewer than cores, 1 to 4.

    Raises UserError, in one sentence, for anything that is wrong with the arguments or the set.
    """
    if image_size is not None:
        check_at_least("--image-size", image_size, 1)
    workers = count_for(workers)
    found = _find(spec)
    if isinstance(found, arrays.Arrays):
        form, of = _stored(found, image_size)
        left_out = 0
    else:
        form, of = _encoded(found, image_size, workers)
        left_out = found.left_out
    train, validation = of if len(of) == 2 else _seeded(of[0], found.title)
    classes = found.classes or tuple(map(str, range(int(of[0].labels.max()) + 1)))
    _check_labels(train, validation, classes, found.title)
    augmentation = augmentation or Augmentation()
    mark = hashlib.blake2b(train.digest() + validation.digest() + repr(augmentation).encode(), digest_size=20)
    given = "" if len(of) == 2 else f" (one in {HELD_OUT}, at random)"
    given += f", {left_out} empty files left out" if left_out else ""
    description = (
        f"{found.title}: {len(train.labels):,} images of {form.height} x {form.width} x {form.channels}, "
        f"{len(classes):,} classes, {len(validation.labels):,} validation images{given}"
    )
    sizes = (form.height, form.width, form.channels)
    return ImageCorpus(
        train, validation, *sizes, classes, augmentation, mark.hexdigest(), Path(os.devnull), description
    )


def _find(spec: str) -> arrays.Arrays | files.EncodedSet:
    if spec in ("digits", "fashion"):
        return getattr(arrays, spec)()
    if is_hub(spec):
        return files.hub(spec)
    if glob.has_magic(spec) and not os.path.exists(path_of(spec)):
        paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(spec), recursive=True))
        if paths and all(path.suffix == ".parquet" for path in paths):
            return files.parquet(paths, spec)
        raise UserError(f"--data: {spec!r} matches {len(paths)} files, and a glob must be of .parquet files")
    path = path_of(spec)
    if path.is_dir():
        if arrays.is_idx(path):
            return arrays.idx(path)
        if arrays.is_cifar(path):
            return arrays.cifar(path)
        if paths := sorted(path.glob("*.parquet")):
            return files.parquet(paths, path.resolve().name)
        return files.folder(path)
    if path.suffix == ".npz" and path.is_file():
        return arrays.npz(path)
    if path.suffix == ".parquet" and path.is_file():
        return files.parquet([path], path.name)
    what = "holds no images that are known" if path.is_file() else "is not there"
    raise UserError(f"--data: {spec!r} {what}; with --task images it may be {WHAT_WORKS}")


def _stored(found: arrays.Arrays, image_size: int | None) -> tuple[Form, list[Source]]:
    height, width, channels = found.train.pixels.shape[1:]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise UserError(f"--image-size scales encoded images; those of {found.title} are arrays of {height} x {width}")
    splits = [x for x in (found.train, found.validation) if x is not None]
    if (got := splits[-1].pixels.shape[1:]) != (height, width, channels):
        sizes = f"{list(got)}, the others {[height, width, channels]}"
        raise UserError(f"--data: the validation images of {found.title} are {sizes}")
    of: list[Source] = [Stored(x.pixels, _labels(x.labels, len(x.pixels), found.title)) for x in splits]
    return Form(height, width, channels, resize=False), of


def _encoded(found: files.EncodedSet, image_size: int | None, workers: int) -> tuple[Form, list[Source]]:
    form = _form(found, image_size)
    decoders = Decoders(form, workers)
    of: list[Source] = []
    for x in (found.train, found.validation):
        if x is not None:
            count = len(x.labels)
            labels = _labels(x.labels, count, found.title)
            of.append(Encoded(x.read, x.name, x.mark, np.arange(count), labels, decoders))
    return form, of


def _labels(labels: np.ndarray, images: int, title: str) -> np.ndarray:
    """int32 [N]. Raises UserError for labels that are no whole numbers from 0 on, or not as many as images."""
    if labels.shape != (images,):
        raise UserError(f"--data: {title} has {images:,} images and labels of shape {list(labels.shape)}")
    if not images:
        raise UserError(f"--data: {title} has a split without images")
    wrong = labels[labels < 0] if labels.dtype.kind == "i" else labels[:0] if labels.dtype.kind == "u" else labels[:1]
    if wrong.size:
        raise UserError(f"--data: labels must be whole numbers from 0 on, and {title} has {wrong[0]}")
    return labels.astype(np.int32)


def _check_labels(train: Source, validation: Source, classes: tuple[str, ...], title: str) -> None:
    present = np.unique(train.labels)
    if present.size < 2:
        raise UserError(f"--data: all images of {title} are of one class, {classes[int(present[0])]}: give two or more")
    for source, name in ((train, "training"), (validation, "validation")):
        if (most := int(source.labels.max())) >= len(classes):
            raise UserError(f"--data: {title} has {len(classes)} classes and a {name} label {most}")
    if len(classes) > max(1000, len(train.labels)):
        raise UserError(
            f"--data: {title} has a label {len(classes) - 1:,} among {len(train.labels):,} images: labels must be the "
            "numbers of classes, 0, 1, 2, …"
        )


def _seeded(source: Source, title: str) -> tuple[Source, Source]:
    """(training images, held-out ones), the same for every seed of a run."""
    count = len(source.labels)
    if count < 2:
        raise UserError(f"--data: {title} has one image; training and validation need one each")
    order, held_out = permutation(0, (_SPLIT,), count), max(1, count // HELD_OUT)
    return source.part(np.sort(order[held_out:])), source.part(np.sort(order[:held_out]))


def _form(found: files.EncodedSet, image_size: int | None) -> Form:
    """The form of a set's images, by a few of them from all over the training split.

    Raises UserError where none can be decoded, or their sizes differ and --image-size is not given.
    """
    count = len(found.train.labels)
    sizes: dict[tuple[int, int], str] = {}
    channels, reason = 1, ""
    for i in np.unique(np.linspace(0, count - 1, min(count, PROBED)).astype(int)).tolist():
        try:
            image = opened(found.train.read(i))
        except UserError:
            raise
        except Exception as error:  # as `decoding.decode`
            reason = reason or f"{found.train.name(i)}: {one_line(error)}"
            continue
        sizes.setdefault((image.height, image.width), found.train.name(i))
        channels = channels if image.mode in GREY else 3
    if not sizes:
        raise UserError(f"--data: none of the images of {found.title} that were tried can be decoded; {reason}")
    if image_size is not None:
        return Form(image_size, image_size, channels, resize=True)
    if len(sizes) > 1:
        (one, name), (other, another) = list(sizes.items())[:2]
        raise UserError(
            f"--data: the images of {found.title} differ in size, {name} {one[0]} x {one[1]} and {another} "
            f"{other[0]} x {other[1]}: --image-size N brings all to N x N"
        )
    ((height, width),) = sizes
    return Form(height, width, channels, resize=False)
