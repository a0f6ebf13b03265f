"""A command's arguments as a dataclass, by tyro: help for 80 columns with examples, and errors of one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fsam_core import UserError

T = TypeVar("T")
WORKS = {int: "a whole number", float: "a number", Path: "a path"}
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]
SUPPRESSED = get_args(tyro.conf.Suppress[str])[1]
_HERE = "DESCRIPTION"  # its place in the help: tyro would join its lines
_TEXT = object()  # the kind of an option whose text is checked later


def parsed(
    command: type[T], arguments: Sequence[str], prog: str, *, default: T | None = None, ignore_unknown: bool = False
) -> T:
    """The arguments as an instance of `command`, whose docstring may end in a section "Examples:" for the help.

    Args:
        prog: the command as it is typed.
        default: the values of what is not given.
        ignore_unknown: leave options that `command` does not have to someone else; --help too.

    Raises:
        UserError: for an unknown option, a missing value and one of another type.
        SystemExit: 0, after the help was printed.
    """
    options: dict[str, Any] = {"prog": prog, "args": arguments, "add_help": not ignore_unknown}
    options |= {} if default is None else {"default": default}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if ignore_unknown:
                return tyro.cli(command, return_unknown_args=True, **options)[0]
            return tyro.cli(command, description=_HERE, **options)
    except SystemExit as stop:
        if not stop.code:
            print(_without_none(out.getvalue()).replace(_HERE, _description(command)), end="")
            raise
        problem = _problem(command, arguments, prog, ignore_unknown)
        raise UserError(problem or _squeezed(err.getvalue(), prog)) from None


def did_you_mean(given: str, known: Sequence[str]) -> str | None:
    """The known name that is meant: a misspelling, the initials of its words, its beginning, or one word of it."""
    if close := difflib.get_close_matches(given, known, 1, 0.75):
        return close[0]
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: given == "".join(word[0] for word in name.split("-")),
        lambda name: name.startswith(given) or given.startswith(f"{name}-"),
        lambda name: given in name.split("-") or name in given.split("-"),
    )
    for rule in rules:
        if found := [name for name in known if rule(name)]:
            return min(found, key=len)
    return next(iter(difflib.get_close_matches(given, known, 1)), None)


def no_command(given: str, known: Sequence[str], prog: str, kind: str = "command") -> UserError:
    """The error for a word that is none of the `known` subcommands of `prog`; `kind` is what they are called."""
    meant = did_you_mean(given.removeprefix("--"), known)
    hint = f"did you mean {prog} {meant}?" if meant else f"use one of {', '.join(known)}"
    return UserError(f"{given!r} is no {kind}; {hint}")


def _description(command: type) -> str:
    text, _, examples = (inspect.getdoc(command) or "").partition("Examples:")
    width = min(shutil.get_terminal_size().columns, 100)
    shown = textwrap.fill(" ".join(text.split()), width)
    if not examples:
        return shown
    lines = (textwrap.fill(line.strip(), width - 2, subsequent_indent="  ") for line in examples.strip().splitlines())
    return f"{shown}\n\nexamples:\n" + textwrap.indent("\n".join(lines), "  ")


def _without_none(text: str) -> str:
    """tyro's help without its notation for options that need not be given; what follows keeps its column."""
    text = re.sub(r"\{None\}\|(\S+)", lambda found: found[1] + " " * len("{None}|"), text)
    text = re.sub(r"\s*\(default:\s+None\)|\{None,(?=\w)", lambda found: "{" if "{" in found[0] else "", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _options(command: type) -> Iterator[tuple[str, Any]]:
    """(name, kind) of each option; the kind is bool, int, float, Path, the choices of a Literal, or `_TEXT`."""
    hints, bare = get_type_hints(command, include_extras=True), get_type_hints(command)
    for field in dataclasses.fields(command):
        kind, marks = bare[field.name], getattr(hints[field.name], "__metadata__", ())
        if dataclasses.is_dataclass(kind):
            yield from _options(kind)  # type: ignore[arg-type]
        elif _POSITIONAL not in marks and SUPPRESSED not in marks:
            aliases = [x.removeprefix("--") for mark in marks for x in getattr(mark, "aliases", None) or ()]
            own_reader = any(isinstance(mark, PrimitiveConstructorSpec) for mark in marks)
            for name in (field.name.replace("_", "-"), *aliases):
                yield name, _TEXT if own_reader else _kind(kind)


def _kind(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(x for x in get_args(kind) if x is not type(None))
    if get_origin(kind) is Literal:
        return get_args(kind)
    return kind if kind in (bool, int, float, Path) else _TEXT


def _problem(command: type, arguments: Sequence[str], prog: str, ignore_unknown: bool) -> str | None:
    """What is wrong with the first bad argument; None where all look good."""
    known, words, hints = dict(_options(command)), list(arguments), get_type_hints(command, include_extras=True)
    places = [name for name, hint in hints.items() if _POSITIONAL in getattr(hint, "__metadata__", ())]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if ignore_unknown or (places and not word.startswith("-")):
                continue
            if places and Path(word).exists():
                return f"{word!r} looks like an option; give a path that begins otherwise: ./{word}"
            return f"{word!r} is no option of {prog}; options begin with --, and {prog} --help lists them"
        given, equals, value = word[2:].partition("=")
        name = given.replace("_", "-")
        kind = known.get(name)
        if kind is bool or known.get(name.removeprefix("no-")) is bool:
            if equals:
                return f"--{name} takes no value, got {value!r}; --no-{name.removeprefix('no-')} is its opposite"
            continue
        if kind is None:
            if ignore_unknown:
                continue
            meant = did_you_mean(name, list(known))
            hint = f"did you mean --{meant}?" if meant else f"{prog} --help lists them"
            return f"--{given} is no option of {prog}; {hint}"
        works = f"one of {', '.join(map(str, kind))}" if isinstance(kind, tuple) else WORKS.get(kind, "a value")
        if not equals:
            if not words or words[0].startswith("--"):
                return f"--{name} needs {works}"
            value = words.pop(0)
        if not _reads(kind, value):
            return f"--{name} must be {works}, got {value!r}"
    return f"{places[0].upper()} is missing; {prog} --help says what to give" if places else None


def _reads(kind: Any, value: str) -> bool:
    if isinstance(kind, tuple):
        return value in map(str, kind)
    try:
        kind(value) if kind in (int, float) else None
    except ValueError:
        return False
    return True


def _squeezed(printed: str, prog: str) -> str:
    """tyro's own message in one line, without its box and its advice."""
    words = re.sub(r"[╭╮╰╯│─]|--{3,}", " ", printed).partition("For full helptext")[0]
    return " ".join(words.split()).rstrip(".") + f"; {prog} --help lists the options"
