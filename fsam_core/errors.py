"""The exception for wrong input, as opposed to an error in the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np


class UserError(ValueError):
    """Wrong input, in one sentence: the argument, the value it got, and a value that would work.

    The `fsam` command prints only the sentence and exits with code 2; a library user sees a `ValueError`.
    """


def check_choice(argument: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise UserError for a value that is none of the allowed ones."""
    if value not in (known := tuple(allowed)):
        raise UserError(f"{argument}: {value!r} is not known; use one of {', '.join(map(str, known))}")


def is_whole(value: Any) -> bool:
    """Whether it is an int, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numpy_to_python(options: Any) -> None:
    """Turn the NumPy scalars among a dataclass's fields into Python's numbers.

    A sweep gives such scalars (`np.arange`); JAX would not promote them as it does a Python number, and JSON has none.
    """
    for field in dataclasses.fields(options):
        if isinstance(value := getattr(options, field.name), np.generic):
            object.__setattr__(options, field.name, value.item())  # also of a frozen one, while it is constructed


def one_line(error: BaseException) -> str:
    """An exception's message in one line of bounded length, for use inside another message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
