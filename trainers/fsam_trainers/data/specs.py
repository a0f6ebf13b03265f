"""The files that a data SPEC names and what they hold, and the error for a SPEC that names none."""

import glob
import os
import platform
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fsam_core.errors import UserError
from fsam_trainers.data.documents import Columns, named_splits, reading
from fsam_trainers.data.kinds import Kind, kind_of
from fsam_trainers.data.records import COLUMNS
from fsam_trainers.files import is_utf8

WHAT_WORKS = (
    "python, a text file, a file of rows with a text column, or a prompt and an answer (.jsonl, .json, .jsonl.gz, "
    ".jsonl.zst, .parquet), a .bin file of tokens, a folder or glob of one of these, or hf:NAME[:CONFIG]"
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
_TEST = re.compile("(?<![a-z])test(?![a-z])")
_ABOUT = ("readme", "license", "changelog")  # names of files that say something about the data beside them


class Files(NamedTuple):
    """The files of a SPEC in order and what they hold; no text is empty. `title` says also what was left out."""

    title: str
    paths: list[Path]
    kind: Kind

    @property
    def size(self) -> int:
        """Their total size in bytes."""
        return sum(path.stat().st_size for path in self.paths)


def is_hub(spec: str) -> bool:
    """Whether the SPEC is a data set for `datasets`, in which no files are looked for."""
    return spec.startswith("hf:")


def find_files(spec: str, columns: Columns = COLUMNS) -> Files:
    """The files of "python", a file, a folder or a glob. Of each one, names, size and at most the beginning is read.

    A file or glob must be of one kind throughout. Of a folder: the files of rows or of tokens directly in it; where
    there are none, all below it but hidden ones, and what is neither text nor rows is left out. Raises UserError where
    nothing is found, or files of several kinds, and for a name that is not UTF-8.
    """
    found = _find_files(spec, columns)
    for path in found.paths:
        if not is_utf8(str(path)):
            raise UserError(f"--data: the name {os.fsencode(path)!r} is not UTF-8; rename it")
    return found


def _find_files(spec: str, columns: Columns) -> Files:
    if spec == "python":
        folder, names = _standard_library()
        title = f"python {platform.python_version()} standard library"
        return _texts(title, [folder / name for name in names], folder, columns)
    if _is_glob(spec):
        paths = [Path(name) for name in sorted(glob.glob(os.path.expanduser(spec), recursive=True))]
        if not (paths := [path for path in paths if path.is_file()]):
            raise UserError(
                f"--data: no file matches {spec!r}: a pattern with ** looks into folders, one with * does not"
            )
        return _chosen(spec, paths, columns)
    path = _existing(spec)
    if path.is_file():
        return _chosen(path.name, [path], columns)
    title = path.resolve().name or str(path)
    with reading(path):
        beside = sorted(child for child in path.iterdir() if child.is_file() and not child.name.startswith("."))
    kinds = {child: kind_of(child, columns).kind for child in beside}
    tokens, rows = ([child for child in beside if kinds[child] == kind] for kind in ("tokens", "rows"))
    if tokens and (rows or not _are_tokens(tokens, beside)):
        other = next(child for child in [*rows, *beside] if child not in tokens)
        raise _mixture(f"the folder {path}", tokens[0], other)
    if tokens or rows:
        return _without_tests(title, tokens or rows, "tokens" if tokens else "rows")
    return _texts(title, [path / name for name in text_names(path)], path, columns)


def path_of(spec: str) -> Path:
    return Path(os.path.expanduser(spec))  # Path.expanduser raises for a user it does not know


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


def _existing(spec: str) -> Path:
    """The path that a SPEC names. Raises UserError if nothing is there."""
    path = path_of(spec)
    if not spec.strip() or not os.path.exists(path):  # Path.exists raises where a name is too long
        raise UserError(
            f"--data: {spec!r} is neither a file nor a folder here, nor anything else that works: {WHAT_WORKS}"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"--data: {path} is neither a regular file nor a folder; what works: {WHAT_WORKS}")
    return path


def _is_glob(spec: str) -> bool:
    """Whether the SPEC is a pattern, and no file of that very name exists."""
    return glob.has_magic(spec) and not os.path.exists(path_of(spec))


def _chosen(title: str, paths: list[Path], columns: Columns) -> Files:
    """Files that the user named: each of them must be usable, and all of one kind."""
    found = [kind_of(path, columns) for path in paths]
    for path, (kind, reason) in zip(paths, found, strict=True):
        if kind == "other":
            raise UserError(f"--data: {path} {reason}")
        if kind != found[0].kind:
            raise _mixture(repr(title), paths[0], path)
    kind = found[0].kind
    if kind == "text" and not (paths := [path for path in paths if path.stat().st_size]):
        raise UserError(f"--data: {title} is empty: give a text file that is not")
    return _without_tests(title, paths, kind)


def _texts(title: str, paths: list[Path], folder: Path, columns: Columns) -> Files:
    """All texts of a folder, or the files of rows among them if the others only describe those."""
    found = {path: kind_of(path, columns) for path in paths}
    rows, texts = ([path for path in paths if found[path].kind == kind] for kind in ("rows", "text"))
    texts = [path for path in texts if path.stat().st_size]
    if rows:
        data = [path for path in texts if not path.name.lower().startswith(_ABOUT)]
        if data:
            raise _mixture(f"the folder {folder}", rows[0], data[0])
        return _without_tests(title, rows, "rows")
    left = [path for path in paths if found[path].kind in ("other", "tokens")]
    first = f"{left[0].relative_to(folder)} {found[left[0]].reason or 'is a file of tokens'}" if left else ""
    if not texts:
        raise UserError(
            f"--data: {folder} holds no text: neither a UTF-8 text file nor a .jsonl, .jsonl.gz or .parquet file"
            + (f"; {first}" if left else "")
        )
    note = f" ({len(left)} other files left out, the first: {first.partition(':')[0]})" if left else ""
    return Files(title + note, texts, "text")


def _without_tests(title: str, paths: list[Path], kind: Kind) -> Files:
    """The files without those named "test", if others are named "train"."""
    tests = [path for path in paths if _TEST.search(path.name.lower())]
    if kind == "text" or not tests or not any("train" in path.name.lower() for path in paths):
        return Files(title, paths, kind)
    return Files(
        f"{title} (without {', '.join(path.name for path in tests[:3])})", [p for p in paths if p not in tests], kind
    )


def _are_tokens(tokens: list[Path], beside: list[Path]) -> bool:
    """Whether a folder's .bin files are what it is there for: by a name, an index, or because there is nothing else."""
    named = any("train" in path.name.lower() for path in tokens) or named_splits(tokens)[1]
    indexed = any(path.with_suffix(".idx").is_file() for path in tokens)
    others = [path for path in beside if path not in tokens and not path.name.lower().startswith((*_ABOUT, "meta."))]
    return bool(named or indexed or not others)


def _mixture(what: str, one: Path, other: Path) -> UserError:
    return UserError(f"--data: {what} holds files of several kinds, {one} and {other}: give one kind, by a glob")


def _standard_library() -> tuple[Path, list[str]]:
    """Its folder, and the .py files in it that are in every distribution's. Raises UserError if there is none."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in text_names(folder, _portable) if name.endswith(".py")]
    if not names:
        raise UserError(f"--data python: {folder} holds no Python sources: give a text file or folder instead")
    return folder, names


def _portable(part: str) -> bool:
    """Whether a file or folder of the standard library is in every distribution's."""
    return part not in _NOT_PORTABLE and not part.startswith(_NOT_PORTABLE_PREFIXES)
