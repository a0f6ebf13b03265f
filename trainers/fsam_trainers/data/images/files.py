"""Sets of encoded images: folders with one subfolder a class, and rows of Parquet files or of the Hugging Face hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.documents import content_digest, extra, reading
from fsam_trainers.data.hub import opened, parse
from fsam_trainers.data.images.decoding import Item

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN, HELD_OUT = ("train", "training"), ("validation", "val", "valid", "test")
_IMAGE, _LABEL = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "class", "cls")


class EncodedSplit(NamedTuple):
    """Images in the order of `labels`, int [N]; read, name, mark: as `sources.Encoded` has them."""

    read: Callable[[int], Item]
    name: Callable[[int], str]
    mark: bytes
    labels: np.ndarray


class EncodedSet(NamedTuple):
    """A set's splits; validation None where it has none. left_out: empty files."""

    title: str
    train: EncodedSplit
    validation: EncodedSplit | None
    classes: tuple[str, ...]
    left_out: int = 0


def folder(root: Path) -> EncodedSet:
    """A folder of class/*.png, or of train/class/*.png beside val/ or test/.

    Raises UserError where there are no classes, or a held-out class that is not trained.
    """
    with reading(root):
        below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    named = {p.name.lower(): p for p in below}
    train = next((named[name] for name in TRAIN if name in named), None)
    held_out = next((named[name] for name in HELD_OUT if name in named), None)
    if train is None:
        train, held_out = root, None
    images = _classes_in(train)
    classes = tuple(images)
    if not classes:
        loose = " but images of its own" if _images_in(train) else ""
        raise UserError(f"--data: {train} holds no folders of images{loose}: it must have one a class, class/*.png")
    first, empty = _class_files(root, train, classes, images)
    second = None
    if held_out is not None:
        images = _classes_in(held_out)
        if others := [name for name in images if name not in classes]:
            raise UserError(f"--data: {held_out / others[0]} is a class that {train} does not have")
        second, more = _class_files(root, held_out, classes, images)
        empty += more
    return EncodedSet(root.resolve().name, first, second, classes, empty)


def _classes_in(split: Path) -> dict[str, list[Path]]:
    """The images of each of its folders that has any."""
    return {p.name: found for p in sorted(split.iterdir()) if p.is_dir() and (found := _images_in(p))}


def _images_in(path: Path) -> list[Path]:
    """Below a folder, in order; zero-byte files too."""
    with reading(path):
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())


def _class_files(
    root: Path, split: Path, classes: tuple[str, ...], images: dict[str, list[Path]]
) -> tuple[EncodedSplit, int]:
    """(the images of a split, how many files are empty)."""
    found = [(label, p, p.stat().st_size) for label, name in enumerate(classes) for p in images.get(name, ())]
    kept = [(label, os.fspath(p), size) for label, p, size in found if size]
    if not kept:
        raise UserError(f"--data: {split}: all {len(found)} files are empty")
    names = [Path(path).relative_to(root).as_posix() for _, path, _ in kept]
    digest = content_digest("files", ((n, str(size).encode()) for n, (*_, size) in zip(names, kept, strict=True)))
    labels = np.array([label for label, *_ in kept])
    one = EncodedSplit(lambda i: kept[i][1], lambda i: names[i], bytes.fromhex(digest), labels)
    return one, len(found) - len(kept)


def parquet(paths: list[Path], title: str) -> EncodedSet:
    """Parquet files with a column of images (bytes, or the hub's struct) and one of labels.

    Files named "val" or "test" are held out if others are named "train".
    """
    train = [p for p in paths if any(word in p.name.lower() for word in TRAIN)]
    others = [p for p in paths if p not in train and any(word in p.name.lower() for word in HELD_OUT)]
    chosen = {"train": train, "validation": others} if train and others else {"train": paths}
    files = {split: [os.fspath(p) for p in of] for split, of in chosen.items()}
    mark = "|".join(f"{p.name} {p.stat().st_size}" for p in paths)
    return _of_splits(title, lambda load: load("parquet", data_files=files), mark)


def hub(spec: str) -> EncodedSet:
    """hf:NAME[:CONFIG], or hf:FOLDER of a kind that `datasets` loads."""
    name, config = parse(spec)
    return _of_splits(name, lambda load: load(name, config), spec)


def _of_splits(title: str, loaded: Callable[[Any], Any], mark: str) -> EncodedSet:
    extra("datasets").disable_progress_bars()
    splits = opened(title, loaded)
    held_out = next((splits[name] for name in HELD_OUT if name in splits), None)
    train, classes = _rows(title, splits["train"], mark)
    validation = None if held_out is None else _rows(title, held_out, mark)[0]
    return EncodedSet(title, train, validation, classes)


def _rows(title: str, rows: Any, mark: str) -> tuple[EncodedSplit, tuple[str, ...]]:
    datasets = extra("datasets")
    kinds = rows.features
    image = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    image = image or next((name for name in _IMAGE if name in kinds), None)
    label = next((name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((name for name in _LABEL if name in kinds), None)
    if image is None or label is None:
        wanted = f"images ({', '.join(_IMAGE)})" if image is None else f"labels ({', '.join(_LABEL)})"
        raise UserError(f"--data: {title} has no column of {wanted}, only: {', '.join(list(kinds)[:10])}")
    if isinstance(kinds[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels = np.asarray(rows[label][:])
    names = tuple(kinds[label].names) if isinstance(kinds[label], datasets.ClassLabel) else ()

    def read(i: int) -> Item:
        found = rows[i][image]
        if isinstance(found, dict):
            return found["bytes"] or found["path"] or b""
        return found or b""

    own = f"{mark}|{rows.num_rows}|{image}|{label}".encode()
    return EncodedSplit(read, lambda i: f"{title}, row {i + 1}", own, labels), names
