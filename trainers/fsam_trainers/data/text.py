"""Text sources: the standard library's own sources, one text file, a folder of text files."""

import codecs
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fsam_core.errors import UserError
from fsam_trainers.data.documents import (
    HELD_OUT,
    Piece,
    Source,
    Split,
    Stream,
    content_digest,
    file_pieces,
    held_out,
    rank,
    reading,
)

# What distributions strip, patch or generate: without it, a Python version has the same text wherever it runs.
# The last line is what Debian's 3.11 adds, drops, or patches in a way that names Debian; it may patch more.
# fmt: off
_NOT_PORTABLE = frozenset({
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__", "sitecustomize.py", "usercustomize.py",
    "_distutils_system_mod.py", "macholib", "pydoc.py", "site.py", "sysconfig", "sysconfig.py", "venv",
})
# fmt: on
_NOT_PORTABLE_PREFIXES = ("config-", "_sysconfigdata")


class TextFile(NamedTuple):
    """A UTF-8 file: its name relative to the corpus, where it is, its length in characters, a digest of its bytes."""

    name: str
    path: Path
    characters: int
    digest: bytes


def python_source() -> Source:
    """The running interpreter's standard library, one document per .py file. Raises UserError if there is none."""
    folder, names = standard_library()
    files = _text_files(folder, names)
    if not any(file.characters for file in files):
        raise UserError(f"--data python: {folder} holds no Python sources: give a text file or folder instead")
    return _source(f"python {platform.python_version()} standard library", files)


def standard_library() -> tuple[Path, list[str]]:
    """Its folder, and the .py files in it that are in every distribution's."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return folder, [name for name in text_names(folder, _portable) if name.endswith(".py")]


def files_source(title: str, paths: list[Path]) -> Source:
    """Text files, one document each. Raises UserError for one that is not UTF-8, and where all are empty."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    files = []
    for path in paths:
        if (file := _scan(path.relative_to(common).as_posix(), path)) is None:
            raise UserError(f"--data: {path} is not UTF-8 text")
        files.append(file)
    if not any(file.characters for file in files):
        raise UserError(f"--data: the files that {title} matches are empty")
    return _source(title, files)


def file_source(path: Path) -> Source:
    """One text file. Raises UserError if it is empty or not UTF-8."""
    file = _scan(path.name, path)
    if file is None:
        raise UserError(
            f"--data: {path} is not UTF-8 text, nor is its name that of a .jsonl, .jsonl.gz, .parquet or .bin file"
        )
    if not file.characters:
        raise UserError(f"--data: {path} is empty")
    return _source(path.name, [file])


def folder_source(folder: Path) -> Source:
    """Every UTF-8 text file below a folder but hidden ones, one document each. Raises UserError if there is none."""
    files = _text_files(folder, text_names(folder))
    if not any(file.characters for file in files):
        raise UserError(
            f"--data: {folder} holds no text: neither a UTF-8 text file below it "
            "nor a .jsonl, .jsonl.gz or .parquet file directly in it"
        )
    return _source(folder.resolve().name or str(folder), files)


def text_names(folder: Path, keep: Callable[[str], bool] = lambda part: not part.startswith(".")) -> list[str]:
    """The posix paths, relative to the folder, of all regular files below it, sorted.

    `keep` says, by its name alone, whether a file or folder is wanted; hidden ones (.git, say) are not.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    with reading(folder):
        for parent, folders, names in os.walk(folder, onerror=fail):
            folders[:] = filter(keep, folders)
            found += (path for name in filter(keep, names) if (path := Path(parent, name)).is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _portable(part: str) -> bool:
    """Whether a file or folder of the standard library is in every distribution's."""
    return part not in _NOT_PORTABLE and not part.startswith(_NOT_PORTABLE_PREFIXES)


def _text_files(folder: Path, names: Iterable[str]) -> list[TextFile]:
    return [file for name in names if (file := _scan(name, folder / name))]


def _scan(name: str, path: Path) -> TextFile | None:
    """Read a file once; None where it is not text, which is: not UTF-8, or with a zero byte in it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest = hashlib.blake2b()
    characters = 0
    with reading(path), path.open("rb") as file:
        while True:
            content = file.read(1 << 20)
            digest.update(content)
            try:
                characters += len(decoder.decode(content, final=not content))
            except UnicodeDecodeError:
                return None
            if b"\0" in content:
                return None
            if not content:
                return TextFile(name, path, characters, digest.digest())


def _source(title: str, files: list[TextFile]) -> Source:
    digest = content_digest("text", ((file.name, file.digest) for file in files))
    full = [file for file in files if file.characters]
    if len(full) == 1:
        return Source(title, "", digest, lambda: _one_file(full[0]))
    return Source(title, "files", digest, lambda: _by_file(files))


def _by_file(files: list[TextFile]) -> list[Stream]:
    """Whole files to one split or the other, by a hash of the name; with text in both splits."""
    full = sorted((file for file in files if file.characters), key=lambda file: rank(file.name))
    chosen = {file.name for file in files if held_out(file.name)}
    if not any(file.name in chosen for file in full):
        chosen.add(full[0].name)
    if all(file.name in chosen for file in full):
        chosen.remove(full[-1].name)

    def read(split: Split) -> Iterator[Piece]:
        for file in files:
            if (file.name in chosen) == (split == "validation"):
                yield from _read(file.path, 0, file.characters, split)

    return [Stream(("train",), read("train")), Stream(("validation",), read("validation"))]


def _one_file(file: TextFile) -> list[Stream]:
    """The last twentieth of the characters for validation, cut at the end of a line where one is near."""
    cut = _cut(file)
    return [
        Stream(("train",), _read(file.path, 0, cut, "train")),
        Stream(("validation",), _read(file.path, cut, file.characters, "validation")),
    ]


def _cut(file: TextFile) -> int:
    mark = file.characters - file.characters // HELD_OUT
    reach = min(file.characters // 10, 1 << 16)
    start, stop = mark - reach, min(mark + reach, file.characters - 1)
    window = "".join(piece.text for piece in _read(file.path, start, max(start, stop), "train"))
    ends = [start + index + 1 for index, character in enumerate(window) if character == "\n"]
    return min(ends, key=lambda end: abs(end - mark), default=mark)


def _read(path: Path, start: int, stop: int, split: Split) -> Iterator[Piece]:
    """Characters start … stop of a file as one document. No newline is translated."""
    with reading(path), path.open(encoding="utf-8", newline="") as file:
        skip = start
        while skip > 0 and (text := file.read(min(skip, 1 << 20))):
            skip -= len(text)
        yield from file_pieces(file, stop - start, split)
