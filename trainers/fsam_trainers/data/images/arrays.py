"""Sets that are arrays already: scikit-learn's digits, IDX files (MNIST's format), CIFAR's binary files, and .npz."""

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsam_core.errors import UserError, one_line
from fsam_trainers.data.documents import extra

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_IDX = {"train": ("train-images", "train-labels"), "validation": ("t10k-images", "t10k-labels")}
_CIFAR = {10: ("data_batch_*.bin", "test_batch.bin", 1), 100: ("train.bin", "test.bin", 2)}
_SIDE = 32  # pixels of CIFAR
# Names of (images, labels) in an .npz: of the training split, then of a held-out one, the first that is there.
_NPZ = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y")),
    "validation": (
        ("x_val", "y_val"),
        ("val_images", "val_labels"),
        ("x_test", "y_test"),
        ("test_images", "test_labels"),
    ),
}


class Split(NamedTuple):
    """pixels: uint8 [N, H, W, C]. labels: int [N]."""

    pixels: np.ndarray
    labels: np.ndarray


class Arrays(NamedTuple):
    """A set's splits; validation None where it has none. classes: their names, () where they have none."""

    title: str
    train: Split
    validation: Split | None
    classes: tuple[str, ...] = ()


def digits() -> Arrays:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, which come with it."""
    found = extra("sklearn.datasets").load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
    return Arrays("digits", Split(pixels, found.target), None, tuple("0123456789"))


def fashion() -> Arrays:
    """Fashion-MNIST where Debian's package puts it."""
    if not is_idx(FASHION):
        raise UserError(
            f"--data fashion: Fashion-MNIST is not in {FASHION}, where apt install dataset-fashion-mnist puts it; "
            "install that, or give a folder of its four IDX files (train-images-idx3-ubyte.gz, …)"
        )
    return idx(FASHION)._replace(title="fashion", classes=FASHION_CLASSES)


def is_idx(folder: Path) -> bool:
    return folder.is_dir() and _named(folder, _IDX["train"][0]) is not None


def idx(folder: Path) -> Arrays:
    """A folder of IDX files, gzipped or not, named as MNIST's are."""
    splits = {}
    for split, (images, labels) in _IDX.items():
        paths = [_named(folder, name) for name in (images, labels)]
        if None not in paths:
            splits[split] = Split(_idx_array(paths[0], 3)[..., None], _idx_array(paths[1], 1))
    if "train" not in splits:
        raise UserError(f"--data: {folder} holds {_IDX['train'][0]} and no {_IDX['train'][1]}")
    return Arrays(folder.name, splits["train"], splits.get("validation"))


def _named(folder: Path, name: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}*"))), None)


def _idx_array(path: Any, axes: int) -> np.ndarray:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data: {path} cannot be read: {one_line(error)}") from error
    start = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)):
        raise UserError(f"--data: {path} is not an IDX file of bytes with {axes} axes: it begins with {content[:4]!r}")
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist()) if len(content) >= start else (0,)
    if len(content) != start + int(np.prod(shape)):
        raise UserError(f"--data: {path} is truncated: {len(content):,} bytes, its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def is_cifar(folder: Path) -> bool:
    return any(next(folder.glob(train), None) for train, *_ in _CIFAR.values())


def cifar(folder: Path) -> Arrays:
    """A folder of CIFAR-10's or CIFAR-100's binary version (of the latter the fine labels)."""
    for classes, (train, test, labels) in _CIFAR.items():
        if paths := sorted(folder.glob(train)):
            parts = [_cifar_file(path, labels, classes) for path in paths]
            held_out = folder / test
            whole = Split(*(np.concatenate(x) for x in zip(*parts, strict=True)))
            validation = _cifar_file(held_out, labels, classes) if held_out.exists() else None
            return Arrays(folder.name, whole, validation, _cifar_names(folder))
    raise UserError(f"--data: {folder} holds no data_batch_*.bin and no train.bin")


def _cifar_file(path: Path, labels: int, classes: int) -> Split:
    content = np.fromfile(path, np.uint8)
    record = labels + 3 * _SIDE**2
    if not content.size or content.size % record:
        raise UserError(f"--data: {path} is truncated: {content.size:,} bytes, no multiple of {record:,} an image")
    rows = content.reshape(-1, record)
    found = Split(rows[:, labels:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), rows[:, labels - 1])
    if found.labels.max() >= classes:
        raise UserError(f"--data: {path} is no binary CIFAR-{classes}: a label is {found.labels.max()}")
    return found


def _cifar_names(folder: Path) -> tuple[str, ...]:
    names = next((p for n in ("batches.meta.txt", "fine_label_names.txt") if (p := folder / n).is_file()), None)
    return tuple(names.read_text(encoding="utf-8").split()) if names else ()


def npz(path: Path) -> Arrays:
    """An .npz of images [N, H, W] or [N, H, W, C] (or channels first) and labels [N], held-out ones beside them or not.

    Raises UserError for a file that is damaged or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            splits = {split: _npz_split(file, names, path) for split, names in _NPZ.items()}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--data: {path} cannot be read: {one_line(error)}") from error
    if splits["train"] is None:
        wanted = " or ".join("/".join(pair) for pair in _NPZ["train"])
        raise UserError(f"--data: {path} must hold {wanted}, got {', '.join(file.files) or 'nothing'}")
    return Arrays(path.name, splits["train"], splits["validation"])


def _npz_split(file: Any, names: Sequence[tuple[str, str]], path: Path) -> Split | None:
    pair = next((pair for pair in names if set(pair) <= set(file.files)), None)
    if pair is None:
        return None
    return Split(_in_bytes(file[pair[0]], f"{path}: {pair[0]}"), np.squeeze(file[pair[1]]))


def _in_bytes(values: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8 [N, H, W, C]: of floats in 0 … 1 times 255, of 16 bits the upper 8."""
    if values.ndim == 3:
        values = values[..., None]
    elif values.ndim == 4 and values.shape[-1] not in (1, 3) and values.shape[1] in (1, 3):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim != 4 or values.shape[-1] not in (1, 3):
        raise UserError(f"--data: {where} must be [N, H, W] or [N, H, W, 1 or 3], got {list(values.shape)}")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    low, high = (float(x) for x in (values.min(initial=0), values.max(initial=0)))
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if low < 0 or high > 255 or not np.isfinite((low, high)).all() or values.dtype.kind not in "iuf":
        got = f"{values.dtype} {low:g} … {high:g}"
        raise UserError(f"--data: {where} must be uint8, uint16 or floats in 0 … 1, got {got}")
    return values.astype(np.uint8)
