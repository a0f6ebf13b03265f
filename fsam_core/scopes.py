"""Scopes: which weights are perturbed, by the names of the parameters.

A function of the name needs nothing else. A named scope needs a `Blocks`, which says what each parameter is. The
trainers' models have one; any other model whose names show it can define one:

    blocks = Blocks(count=12, block=r"^h\\.(\\d+)\\.", above=r"^ln_f\\.", head=r"^wte\\.", norms=r"ln_")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fsam_core.errors import UserError

Scope = str | Callable[[str], bool]
NAMES = ("all", "no-head", "norms", "top:K")


@dataclass(frozen=True)
class Blocks:
    """The roles of a model's parameters, as regular expressions that are searched for in their names.

    Attributes:
        count: the number of blocks.
        block: matches the parameters of blocks; its first group is the block's index, 0 at the bottom.
        above: matches the parameters above the last block, an untied head included, a tied one not.
        head: matches the head's weight and bias, tied or not.
        norms: matches the scales and shifts of normalisations.
    """

    count: int
    block: str
    above: str
    head: str
    norms: str


def check(scope: Scope) -> None:
    """Check that `scope` is one.

    Raises:
        UserError: listing the scopes.
    """
    if not callable(scope) and scope not in NAMES[:-1] and _top(scope) is None:
        raise UserError(f"scope: {scope!r} is not known; use {', '.join(NAMES)} (top:3), or a function of names")


def mask(scope: Scope, names: Sequence[str], blocks: Blocks | None) -> list[bool] | None:
    """For each name, whether the scope contains it; None if it contains all.

    Raises:
        UserError: for a named scope without `blocks`, more blocks than the model has, or a scope without parameters.
    """
    if scope == "all":
        return None
    if callable(scope):
        found = [bool(scope(name)) for name in names]
    elif blocks is None:
        raise UserError(
            f"scope: {scope!r} needs blocks=Blocks(...), which gives the roles of the parameters by their names"
        )
    else:
        found = [_holds(scope, name, blocks) for name in names]
    if not any(found):
        some = ", ".join(names[:3])
        raise UserError(f"scope: {scope!r} holds none of the {len(names)} parameters ({some}, ...); check its names")
    return found


def _holds(scope: str, name: str, blocks: Blocks) -> bool:
    if scope == "no-head":
        return not re.search(blocks.head, name)
    if scope == "norms":
        return bool(re.search(blocks.norms, name))
    top = _top(scope)
    assert top is not None
    if top > blocks.count:
        raise UserError(f"scope: {scope!r} asks for more than the {blocks.count} blocks of the model")
    found = re.search(blocks.block, name)
    return int(found[1]) >= blocks.count - top if found else bool(re.search(blocks.above, name))


def _top(scope: Scope) -> int | None:
    found = re.fullmatch(r"top:(\d+)", scope) if isinstance(scope, str) else None
    return int(found[1]) if found and int(found[1]) else None
