"""Atomic replacement of files and folders: at any moment a path holds the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsam_core import UserError

SETTLED = 2_000_000_000  # nanoseconds without a change, after which a file's times tell the next one


def begin_folder(target: Path) -> Path:
    """A temporary folder next to `target`, to be filled and given to `publish`.

    Raises:
        UserError: when the disk refuses (full, read-only), naming the target.
    """
    temporary = target.with_name(f".writing-{target.name}-{os.getpid()}")
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, target: Path) -> None:
    """Turn a folder of `begin_folder` into `target`, in the place of what is there.

    Raises:
        UserError: when the disk refuses.
    """
    with disk_errors(target):
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync(target.parent)


def sweep(parent: Path) -> None:
    """Remove what a killed process left of `begin_folder`s in `parent`, in which no other process may be writing."""
    for path in parent.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step.

    Raises:
        UserError: when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def copy_file(source: Path, path: Path) -> None:
    """As `write_text`, with the bytes of another file; nothing happens where it is the same file.

    Raises:
        UserError: when the disk refuses.
    """
    if path.exists() and path.samefile(source):
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with disk_errors(path):
        try:
            shutil.copyfile(source, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for plain values; NaN and infinities become null, as JSON has neither."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """As `write_text`, for a table of strings, numbers, booleans and paths, with dashes in its keys; None is left out.

    Such values are written in TOML as in JSON.
    """
    plain = {k.replace("_", "-"): str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}
    write_text(path, "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in plain.items()))


def finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold turned into None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not (abs(value) < float("inf")) else value


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes, read once while it stays as it is: a command asks for its base several times."""
    seen = path.stat()
    changed = max(seen.st_mtime_ns, seen.st_ctime_ns)
    # A later change might have the same time where the last one is as recent as a clock's tick.
    known = _checksum if time.time_ns() - changed > SETTLED else _checksum.__wrapped__
    return known(path, (seen.st_ino, seen.st_size, changed))


@lru_cache(maxsize=4096)
def _checksum(path: Path, seen: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def writable(option: str, path: Path) -> None:
    """Fail before hours of work when `path` cannot be written after them.

    Raises:
        UserError: naming the option.
    """
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; give the name of a file")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option}: the folder {folder} cannot be written to")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says while `path` is written into one sentence."""
    try:
        yield
    except OSError as error:
        reason = "no space left for it" if is_full(error) else error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; nothing was left half-written") from error


def is_full(error: BaseException) -> bool:
    """Whether this is a disk's, a quota's or a process's limit."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_utf8(name: str) -> bool:
    """Whether a name can be written into a file; Python has surrogates for the bytes of one that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
