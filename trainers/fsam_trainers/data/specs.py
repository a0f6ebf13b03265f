"""The files that a data SPEC names, and the error for a SPEC that names none."""

import glob
import os
from pathlib import Path
from typing import NamedTuple

from fsam_core.errors import UserError
from fsam_trainers.data.documents import reading
from fsam_trainers.data.records import is_records
from fsam_trainers.data.text import standard_library, text_names

WHAT_WORKS = (
    "python, a text file, folder or glob, a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file (or a folder or glob of "
    "them) with a text column, a .bin file of tokens, or hf:NAME[:CONFIG]"
)


class Files(NamedTuple):
    """The files of a SPEC in order. `rows`: they hold rows with a text column, else each one is a text.

    `chosen`: they were named by the user one by one or by a glob, so one that is not text is an error.
    """

    title: str
    paths: list[Path]
    rows: bool
    chosen: bool

    @property
    def size(self) -> int:
        """Their total size in bytes."""
        total = 0
        for path in self.paths:
            with reading(path):
                total += path.stat().st_size
        return total


def path_of(spec: str) -> Path:
    return Path(os.path.expanduser(spec))  # Path.expanduser raises for a user it does not know


def existing(spec: str) -> Path:
    """The path that a SPEC names. Raises UserError if nothing is there."""
    path = path_of(spec)
    if not spec.strip() or not os.path.exists(path):  # Path.exists raises where a name is too long
        raise UserError(
            f"--data: {spec!r} is neither a file nor a folder here, nor anything else that works: {WHAT_WORKS}"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"--data: {path} is neither a regular file nor a folder; what works: {WHAT_WORKS}")
    if (path / "train.bin").is_file():
        raise UserError(f"--data: {path} is a folder of token shards: give the file, {path / 'train.bin'}")
    return path


def is_glob(spec: str) -> bool:
    """Whether the SPEC is a pattern, and no file of that very name exists."""
    return glob.has_magic(spec) and not spec.startswith("hf:") and not os.path.exists(path_of(spec))


def matches(spec: str) -> Files:
    """The files that a glob names, sorted. Raises UserError for none, and for a mixture of rows and texts."""
    paths = [
        path for name in sorted(glob.glob(os.path.expanduser(spec), recursive=True)) if (path := Path(name)).is_file()
    ]
    rows = [path for path in paths if is_records(path)]
    if not paths:
        raise UserError(f"--data: no file matches {spec!r}: a pattern with ** looks into folders, one with * does not")
    if rows and len(rows) < len(paths):
        other = next(path for path in paths if path not in rows)
        raise UserError(f"--data: {spec!r} matches files of rows, {rows[0]}, and others, {other}: give one kind")
    return Files(spec, paths, bool(rows), chosen=True)


def find_files(spec: str) -> Files:
    """The files of "python", a file, a folder or a glob, found by their names alone: none is opened.

    Of a folder: the files of rows directly in it, or where there are none every file below it but hidden ones. Raises
    UserError where nothing is found.
    """
    if spec == "python":
        folder, names = standard_library()
        return Files("python standard library", [folder / name for name in names], rows=False, chosen=False)
    if is_glob(spec):
        return matches(spec)
    path = existing(spec)
    if path.is_file():
        return Files(path.name, [path], is_records(path), chosen=True)
    title = path.resolve().name or str(path)
    with reading(path):
        records = sorted(child for child in path.iterdir() if is_records(child) and child.is_file())
    if records:
        return Files(title, records, rows=True, chosen=False)
    return Files(title, [path / name for name in text_names(path)], rows=False, chosen=False)
