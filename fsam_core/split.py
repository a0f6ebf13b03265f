"""What a step is given: a batch, or several micro-batches; and splitting them into S and the rest.

A batch is whatever the user's loader gives: arrays in lists, tuples, mappings and dataclasses, nested in any way.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from fractions import Fraction
from typing import Any

from fsam_core.errors import UserError

TreeMap = Callable[[Callable[[Any], Any], Any], Any]
"""(function, tree) -> the tree with function(leaf) in place of each leaf"""
Of = Any
"""A part of a batch: a key (of a tuple: an index), or a function of the batch."""
IsKey = Callable[[Any], bool]
"""Whether a leaf is a random key, which may have an axis."""
IGNORED = -100
"""The label of a position that has none."""
LARGEST = 1 << 16
"""Denominator of a share of the batch."""
SHARED = (bool, int, float, complex, str, bytes, type(None))
"""Leaves that have no rows: S and the rest both get them."""


class MicroBatches:
    """The micro-batches of one step, whose gradient is that of one batch of them all.

        loss = step(MicroBatches([first, second]))

    Nothing else is read as several micro-batches: a list is one batch, as PyTorch's default collate makes it.

    Raises:
        UserError: where there is none.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = tuple(batches)
        if not self.batches:
            raise UserError("MicroBatches: got no micro-batch; give at least one")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __repr__(self) -> str:
        return f"MicroBatches({list(self.batches)!r})"


def micro_batches(batch: Any) -> list[Any]:
    """The micro-batches of a step's argument; a batch is the only one of its own."""
    return list(batch) if isinstance(batch, MicroBatches) else [batch]


def part_of(batch: Any, of: Of) -> Any:
    """A part of the batch; None for None.

    Raises:
        UserError: where the batch has no such part.
    """
    if of is None:
        return None
    if callable(of):
        return of(batch)
    try:
        return batch[of]
    except (KeyError, IndexError, TypeError):
        raise UserError(
            f"labels: the batch, a {type(batch).__name__}, has no {of!r}; give its key or a function"
        ) from None


def no_key(leaf: Any) -> bool:
    """PyTorch has no keys among its tensors."""
    return False


def leaves(batch: Any) -> Iterator[Any]:
    """What a batch's tuples, lists, mappings and dataclasses hold."""
    if isinstance(batch, Mapping):
        items: Iterable[Any] = batch.values()
    elif isinstance(batch, tuple | list):
        items = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        items = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    else:
        yield batch
        return
    for one in items:
        yield from leaves(one)


def with_own_containers(batch: Any) -> Any:
    """The batch with its mappings and lists copied, so that who takes an item out of them leaves it in the batch."""
    if isinstance(batch, tuple | list):
        return _of_items(batch, [with_own_containers(x) for x in batch])
    if not isinstance(batch, MutableMapping):
        return batch
    found = _copied(batch, {key: with_own_containers(value) for key, value in batch.items()})
    return batch if found is None else found


def _copied(batch: Any, items: Mapping[Any, Any]) -> Any:
    """A copy of a mutable mapping with these items; None where copies write to the original, as flax's nnx.State do."""
    found = copy.copy(batch)
    for key, value in items.items():
        before = batch[key]
        if value is before:
            continue
        found[key] = value
        if batch[key] is not before:
            batch[key] = before
            return None
    return found


def _of_items(like: Any, items: list[Any]) -> Any:
    """A tuple or list of the same type."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def map_leaves(
    function: Callable[[Any], Any], batch: Any, tree_map: TreeMap, is_leaf: Callable[[Any], bool] = lambda x: False
) -> Any:
    """The batch with function(leaf) in place of each leaf; containers keep their types.

    Args:
        tree_map: the framework's own, for the containers that only the framework knows.
        is_leaf: which tuples and lists are leaves, too.
    """
    if isinstance(batch, Mapping):
        changed = {key: map_leaves(function, value, tree_map, is_leaf) for key, value in batch.items()}
        if type(batch) is dict:
            return changed
        if not hasattr(batch, "__setitem__"):
            return type(batch)(changed)  # type: ignore[call-arg]
        # A UserDict, a BatchEncoding, a defaultdict: with what else it holds.
        found = _copied(batch, changed)
        return tree_map(function, batch) if found is None else found
    if isinstance(batch, tuple | list):
        if is_leaf(batch):
            return function(batch)
        return _of_items(batch, [map_leaves(function, x, tree_map, is_leaf) for x in batch])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(
            batch, **{name: map_leaves(function, x, tree_map, is_leaf) for name, x in fields.items()}
        )
    return tree_map(function, batch)


def ratio(share: float) -> Fraction:
    """The whole numbers that a share of a batch stands for: 1/3 for 0.333…, never 0, and 1 for 1 alone."""
    found = Fraction(share).limit_denominator(LARGEST)
    return found if share == 1 else min(max(found, Fraction(1, LARGEST)), Fraction(LARGEST - 1, LARGEST))


def split(
    batches: list[Any], fraction: float, tree_map: TreeMap, is_key: IsKey = no_key
) -> tuple[list[Any], list[Any]]:
    """(S, the rest) as lists of micro-batches; S is `fraction` of all rows, and never empty.

    S takes whole micro-batches first, each as an equal part of the rows, whatever its size. Then it takes every n-th
    row of the next one, so that every device of a batch sharded along its first axis contributes its share. Leaves
    without axes (a number), and random keys, go to both; a list of as many of them as there are rows is cut.

    Args:
        batches: micro-batches, trees of arrays.
        fraction: 0 < q ≤ 1.
        tree_map: as in `map_leaves`.
        is_key: of the framework.

    Raises:
        UserError: if a micro-batch cannot be cut at that fraction.
    """
    whole, share = divmod(ratio(fraction) * len(batches), 1)
    part, rest = batches[:whole], batches[whole:]
    if share:
        mine, others = _cut(rest[0], share, tree_map, is_key)
        part, rest = [*part, mine], [others, *rest[1:]]
    return part, rest


def _cut(batch: Any, share: Fraction, tree_map: TreeMap, is_key: IsKey) -> tuple[Any, Any]:
    sizes: set[int] = set()

    def look(x: Any) -> Any:
        if getattr(x, "is_sparse", False) or getattr(x, "is_nested", False):
            raise UserError("fraction: a sparse or nested tensor of the batch cannot be cut; give MicroBatches")
        if _has_rows(x) and not is_key(x):
            sizes.add(x.shape[0])
        elif not (hasattr(x, "ndim") or isinstance(x, SHARED)):
            raise UserError(
                f"fraction: a batch holds a {type(x).__name__}, which is not known how to cut; give arrays in lists, "
                "tuples, mappings or dataclasses, or MicroBatches of which S is one"
            )
        return x

    map_leaves(look, batch, tree_map)
    if len(sizes) != 1:
        got = ", ".join(map(str, sorted(sizes))) or "no arrays"
        raise UserError(f"fraction: the arrays of a batch must have one first axis to be cut along, got {got}")
    size, n = sizes.pop(), share.denominator
    check_keys(batch, size, is_key, "fraction")
    if size % n:
        raise UserError(
            f"fraction: {share} of a (micro-)batch of {size} rows is not a whole number of rows; {n} must divide it (a "
            "loader's drop_last=True leaves out a short last batch)"
        )

    def is_column(x: Any) -> bool:
        """Whether a list has a text or a number for each row, as a loader collates them."""
        alone = lambda one: one is not None and not isinstance(one, tuple | list | Mapping) and not _has_rows(one)
        return len(x) == size > 1 and not hasattr(x, "_fields") and all(map(alone, x))

    def rows(which: slice) -> Callable[[Any], Any]:
        def of(x: Any) -> Any:
            if isinstance(x, tuple | list):
                return type(x)(one for at in range(0, size, n) for one in x[at : at + n][which])
            if not _has_rows(x) or is_key(x):
                return x
            groups = x.reshape((size // n, n, *x.shape[1:]))[:, which]
            return groups.reshape((-1, *x.shape[1:]))

        return of

    sides = (slice(None, share.numerator), slice(share.numerator, None))
    mine, others = (map_leaves(rows(side), batch, tree_map, is_column) for side in sides)
    return mine, others


def rows_of(batch: Any, is_key: IsKey = no_key) -> float:
    """The first axis of the batch's first array; 1 where it holds none."""
    return next((float(x.shape[0]) for x in leaves(batch) if _has_rows(x) and not is_key(x)), 1.0)


def check_keys(batch: Any, rows: int, is_key: IsKey, argument: str) -> None:
    """Check that what looks like an old random key cannot be a number for each row.

    Raises:
        UserError: for a batch in which it can.
    """
    if any(is_key(x) and _has_rows(x) and x.shape[0] == rows for x in leaves(batch)):
        raise UserError(
            f"{argument}: a uint32 array of the batch, of shape ({rows},), may be a random key or data of its {rows} "
            "rows; make keys with jax.random.key, and give data another dtype"
        )


def _has_rows(x: Any) -> bool:
    return bool(getattr(x, "ndim", 0))
