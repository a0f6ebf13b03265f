"""Checkpoints of a run: a folder a step, complete or absent, checked against its own list of checksums when read.

OUT/checkpoints/step_00000100/state/      the framework's own format (orbax, torch.distributed.checkpoint)
                              run.json    settings, data, position, seconds so far
                              files.json  size and BLAKE2b of every file above
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core import UserError
from fsam_trainers import ranks
from fsam_trainers.files import checksum, disk_errors, new_folder, sweep, write_json


class Checkpoint(NamedTuple):
    """A valid checkpoint on disk."""

    folder: Path
    run: dict[str, Any]
    """What `save` was given."""

    @property
    def state(self) -> Path:
        return self.folder / "state"


def save(root: Path, step: int, run: dict[str, Any], write_state: Callable[[Path], None], size: int, keep: int) -> Path:
    """Write the checkpoint of `step`, about `size` bytes, then drop all but the newest `keep`.

    Of several ranks all write their part of the state, into a folder that they share; the main one makes it valid.

    Raises:
        UserError: when the disk refuses; older checkpoints stay, nothing half-written does.
    """
    target = root / f"step_{step:08d}"
    with disk_errors(target), contextlib.ExitStack() as stack:

        def begun() -> Path:
            if target.exists():  # the same step of the same run: it is already there, or damaged
                shutil.rmtree(target)
            folder = stack.enter_context(new_folder(target))
            # Asked first, because the frameworks' writers say "disk full" late, at length and in words of their own.
            if (free := shutil.disk_usage(folder).free) < size:
                raise UserError(
                    f"cannot write {target}: it takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
                    "nothing was left half-written"
                )
            return folder

        def sealed() -> None:
            with disk_errors(target):
                write_json(folder / "run.json", run)
                write_json(folder / "files.json", {name: list(entry) for name, entry in _entries(folder).items()})
                stack.close()
            for old in _folders(root)[:-keep]:
                shutil.rmtree(old)

        folder = ranks.current().from_main(begun)
        try:
            write_state(folder / "state")
        except (OSError, UserError):
            raise
        except Exception as error:
            if ranks.is_lost(error):
                raise
            full = any(text in str(error) for text in ("No space left", "File too large", "Disk quota exceeded"))
            full = full or shutil.disk_usage(folder).free < 2**20  # torch: "enforce fail … unexpected pos"
            reason = "no space left for it" if full else _first_line(error)
            raise UserError(f"cannot write {target}: {reason}; nothing was left half-written") from error
        ranks.current().from_main(sealed)
    return target


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, None where there are none; each damaged one on the way is warned about.

    Raises:
        UserError: when there are checkpoints and every one is damaged.
    """
    if not root.is_dir():
        return None
    sweep(root)
    folders = _folders(root)
    for folder in reversed(folders):
        if not (damage := _damage(folder)):
            return Checkpoint(folder, json.loads((folder / "run.json").read_text(encoding="utf-8")))
        warn(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
    if folders:
        raise UserError(
            f"--out: no checkpoint in {root} is whole (the newest: {_damage(folders[-1])}); delete the folder to start "
            "again, or give another --out"
        )
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if path.is_dir())


def _entries(folder: Path) -> dict[str, tuple[int, str]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "files.json")
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, checksum(p)) for p in paths}


def _damage(folder: Path) -> str:
    try:
        listed = {k: tuple(v) for k, v in json.loads((folder / "files.json").read_text(encoding="utf-8")).items()}
        found = _entries(folder)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"files.json cannot be read: {_first_line(error)}"
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    return f"{wrong[0]} is not what was written" if wrong else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
