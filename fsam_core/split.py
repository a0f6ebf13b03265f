"""Splitting a batch into S, on which the correction is computed, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fsam_core.errors import UserError

Flatten = Callable[[Any], tuple[list[Any], Callable[[list[Any]], Any]]]


def split(
    batches: list[Any], fraction: float, flatten: Flatten, is_key: Callable[[Any], bool] = lambda leaf: False
) -> tuple[list[Any], list[Any]]:
    """(S, the rest) as lists of micro-batches; S is `fraction` of all rows, and never empty.

    S takes whole micro-batches first, then every n-th row of the next one, so that every device of a batch sharded
    along its first axis contributes its share. Leaves without axes (a number), and random keys, go to both.

    Args:
        batches: micro-batches, trees of arrays.
        fraction: 0 < q ≤ 1.
        flatten: tree -> (its leaves, a function that puts such leaves back).
        is_key: whether a leaf is a random key, which may have an axis.

    Raises:
        UserError: if a micro-batch cannot be cut at that fraction.
    """
    whole, share = divmod(Fraction(fraction).limit_denominator(1 << 16) * len(batches), 1)
    part, rest = batches[:whole], batches[whole:]
    if share:
        mine, others = _cut(rest[0], share, flatten, is_key)
        part, rest = [*part, mine], [others, *rest[1:]]
    return part, rest


def _cut(batch: Any, share: Fraction, flatten: Flatten, is_key: Callable[[Any], bool]) -> tuple[Any, Any]:
    leaves, rebuild = flatten(batch)
    has_rows = lambda x: bool(getattr(x, "ndim", 0)) and not is_key(x)
    sizes = {x.shape[0] for x in leaves if has_rows(x)}
    if len(sizes) != 1:
        got = ", ".join(map(str, sorted(sizes))) or "no arrays"
        raise UserError(f"fraction: the arrays of a batch must have one first axis to be cut along, got {got}")
    size, n = sizes.pop(), share.denominator
    if size % n:
        raise UserError(
            f"fraction: {share} of a (micro-)batch of {size} rows is not a whole number of rows; {n} must divide it"
        )

    def rows(x: Any, which: slice) -> Any:
        if not has_rows(x):
            return x
        groups = x.reshape((size // n, n, *x.shape[1:]))[:, which]
        return groups.reshape((-1, *x.shape[1:]))

    sides = (slice(None, share.numerator), slice(share.numerator, None))
    mine, others = (rebuild([rows(x, side) for x in leaves]) for side in sides)
    return mine, others
