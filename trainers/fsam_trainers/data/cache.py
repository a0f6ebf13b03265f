"""Entries of the token cache: written atomically, verified when opened.

An entry is a folder with train.bin, validation.bin, tokenizer.json (or tokenizer.model) and meta.json. It is built
under a temporary name in the same folder and renamed in one step, so no process ever sees half of one, even if the
build is killed.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.data.corpus import DTYPES, Corpus, checksum, fingerprint, map_tokens
from fsam_trainers.data.documents import extra
from fsam_trainers.data.vocabulary import is_json
from fsam_trainers.files import is_full, sync

SENTENCEPIECE = "tokenizer.model"
_BUILDING = ".building-"
_DAY = 86400.0  # seconds


def cache_root(cache: Path | None) -> Path:
    """The cache's folder, made where it is missing: the argument, else FSAM_CACHE, else the user's cache folder.

    Raises UserError if it cannot be made.
    """
    root = Path(
        os.path.expanduser(cache or os.environ.get("FSAM_CACHE") or extra("platformdirs").user_cache_dir("fsam"))
    )
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
    return root


def build_entry(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make the entry `folder` by calling `fill` with an empty folder, in which it writes the entry's four files.

    Where another process made the same entry meanwhile, that one stays. Raises UserError if writing fails; whatever
    is raised, nothing stays behind.
    """
    _sweep(folder.parent)
    building = folder.parent / f"{_BUILDING}{os.getpid()}-{secrets.token_hex(8)}"
    with _writing(folder.parent):
        try:
            building.mkdir()
            fill(building)
            sync(building)
            try:
                building.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
                shutil.rmtree(building, ignore_errors=True)  # the other process was faster
            sync(folder.parent)
        except BaseException:  # a keyboard interrupt too
            shutil.rmtree(building, ignore_errors=True)
            raise


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing, synchronized to the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_tokenizer(folder: Path, content: bytes) -> None:
    """Write an entry's tokenizer.json, or the SentencePiece model in its place."""
    with durable(folder / ("tokenizer.json" if is_json(content) else SENTENCEPIECE)) as file:
        file.write(content)


def read_tokenizer(folder: Path) -> bytes:
    """The content of an entry's tokenizer.json or SentencePiece model."""
    model = folder / SENTENCEPIECE
    return (model if model.is_file() else folder / "tokenizer.json").read_bytes()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write an entry's meta.json; `open_entry` documents its keys."""
    with durable(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2, ensure_ascii=False).encode() + b"\n")


def open_entry(folder: Path) -> Corpus:
    """The corpus of an entry, after checking sizes and checksums. Raises UserError naming a damaged file.

    meta.json: dtype, vocab_size, train_tokens, validation_tokens, train_blake2b, validation_blake2b, fingerprint,
    description.
    """
    with _checking(folder, "meta.json"):
        meta = json.loads((folder / "meta.json").read_bytes())
        dtype = DTYPES[meta["dtype"]]
        vocab_size, mark, description = int(meta["vocab_size"]), str(meta["fingerprint"]), str(meta["description"])
        if fingerprint(vocab_size, dtype, meta["train_blake2b"], meta["validation_blake2b"]) != mark:
            raise ValueError("its fingerprint does not match")
        expected = {split: (meta[f"{split}_tokens"], meta[f"{split}_blake2b"]) for split in ("train", "validation")}
    if not (folder / SENTENCEPIECE).is_file():
        with _checking(folder, "tokenizer.json"):
            json.loads((folder / "tokenizer.json").read_bytes())
    tokens = {split: _open_tokens(folder, f"{split}.bin", dtype, *expected[split]) for split in expected}
    return Corpus(tokens["train"], tokens["validation"], vocab_size, mark, folder, description)


def _open_tokens(folder: Path, name: str, dtype: np.dtype, count: int, digest: str) -> np.ndarray:
    with _checking(folder, name):
        size = (folder / name).stat().st_size
        if size != count * dtype.itemsize:
            raise ValueError(f"it has {size:,} bytes and should have {count * dtype.itemsize:,}")
        tokens = map_tokens(folder / name, dtype)
        if checksum(tokens) != digest:
            raise ValueError("its checksum does not match")
        return tokens


@contextmanager
def _checking(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]!r} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"--cache: {folder / name} is damaged ({reason}): delete the folder {folder} and run again"
        ) from error


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "no space left" if is_full(error) else (error.strerror or str(error))
        raise UserError(f"--cache: cannot write in {root}: {reason}: make room there or give another folder") from error


def _sweep(root: Path) -> None:
    """Remove the folders of killed builds: those without a write for a day."""
    for folder in root.glob(f"{_BUILDING}*"):
        with suppress(OSError):  # another process may be sweeping too
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _DAY:
                shutil.rmtree(folder, ignore_errors=True)
