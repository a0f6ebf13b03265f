"""`--config FILE.toml`: the options of a command in a file, which the command line overrides.

A file is a flat table with the names of the options. Every run writes its own as OUT/config.toml.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fsam_core import UserError
from fsam_trainers.cli.parsing import SUPPRESSED, parsed
from fsam_trainers.config import SAVINGS
from fsam_trainers.presets import PRESETS, VIT_PRESETS
from fsam_trainers.resuming import BranchPoint

NOT_IN_A_FILE = ("config", "arguments", "run", "corpus", "intervals", "model")
ALIASES = {"schedule": "learning_rate_schedule"}
# Option -> those of a file that it replaces when it is on the command line: they are what it stands for.
STANDS_FOR: dict[str, frozenset[str]] = {
    "savings": frozenset(name for options in SAVINGS.values() for name in options),
    "preset": frozenset(("batch", "learning_rate", "rho", *PRESETS["tiny"].sizes, *VIT_PRESETS["vit-tiny"].sizes)),
    "tokens_per_param": frozenset(("steps",)),
    "steps": frozenset(("tokens_per_param",)),
}


@dataclass(frozen=True)
class Files:
    """The options that name a file of options."""

    config: Path | None = None
    branch_from: str | None = None


def expanded(commands: Mapping[str, type], arguments: Sequence[str], prog: str) -> tuple[str, ...]:
    """The arguments after those of the files that they name: the base run's of --branch-from, then --config.

    Args:
        commands: the command for each task; a file's options are those of its own task.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    files = parsed(Files, arguments, prog, ignore_unknown=True)
    found: list[str] = []
    own = {x[2:].partition("=")[0].replace("-", "_") for x in arguments if x.startswith("--")}
    replaced = frozenset[str]().union(*(of for name, of in STANDS_FOR.items() if name in own))
    if files.branch_from is not None and "branch_from" in get_type_hints(commands["text"]):
        base = BranchPoint.parse(files.branch_from).run / "config.toml"
        if not base.is_file():
            raise UserError(f"--branch-from: {base} is not there; give the folder of a run of `fsam train`")
        found += _arguments(commands, "--branch-from", base, replaced | {"branch_from"})
    if files.config is not None:
        found += _arguments(commands, "--config", files.config, replaced)
    return (*found, *arguments)


def read(path: Path) -> dict[str, Any]:
    """The file's table, with underscores in its keys.

    Raises:
        UserError: for a file that is not there or is no TOML.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # an editor on Windows may begin it with a mark
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config: {path} is not TOML: {error}") from error
    return {key.replace("-", "_"): value for key, value in table.items()}


def _arguments(commands: Mapping[str, type], option: str, path: Path, replaced: frozenset[str]) -> Iterator[str]:
    """The file's options but for the `replaced` ones, as arguments."""
    table = read(path)
    known = dict(_options(commands["images" if table.get("task") == "images" else "text"]))
    for key, value in table.items():
        name, kind = key.replace("_", "-"), known.get(ALIASES.get(key, key))
        if kind is None:
            raise UserError(f"{option}: {path}: {name!r} is not the name of an option; fsam train --help lists them")
        if kind is _Replaced:
            continue
        wrong = isinstance(value, dict | list) or isinstance(value, bool) != (kind is bool)
        if wrong or (kind in (int, float) and not isinstance(value, int | float)):
            works = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a string or a number")
            raise UserError(f"{option}: {path}: {name} must be {works}, got {value!r}")
        if key not in replaced:
            yield f"--{'' if value is not False else 'no-'}{name}" + ("" if kind is bool else f"={value}")


class _Replaced:
    """The type of an option that this command replaces by its own; a file may have it."""


def _options(command: type) -> Iterator[tuple[str, Any]]:
    """(name, type) of every option of a command."""
    hints, bare = get_type_hints(command, include_extras=True), get_type_hints(command)
    for field in dataclasses.fields(command):
        if field.name not in NOT_IN_A_FILE:
            hidden = SUPPRESSED in getattr(hints[field.name], "__metadata__", ())
            yield field.name, _Replaced if hidden else bare[field.name]
        elif dataclasses.is_dataclass(bare[field.name]):
            yield from _options(bare[field.name])
