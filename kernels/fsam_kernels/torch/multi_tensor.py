"""The direction for lists of tensors on a GPU, by PyTorch's list operations: one kernel for many tensors at once.

On a CPU such an operation is a loop over the tensors, and pieces that stay in the cache are quicker (`direction`). Here
a batch is as many whole tensors as have `PIECE` elements together, or a piece of a larger one, so that temporaries stay
bounded. The form of the direction and its factors k and c are those of `direction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_kernels.torch.direction import PIECE, Adam, Entry, accum_dtype, entries, pieces

Factor = Tensor | float


class Batch(NamedTuple):
    """Tensors on one device, whose arrays have the same dtypes and whose direction has the same β₂ and eps.

    Attributes:
        places: the position of each in the given lists.
        arrays: one list for each given list, None where that is None.
        adam: of each; None for the plain direction.
    """

    places: list[int]
    arrays: tuple[Any, ...]
    adam: list[Adam] | None


class Directions(NamedTuple):
    """d / k and g or c g of a batch, with the factors: `k` of all tensors, or one for each, [tensors]."""

    d: list[Tensor]
    g: list[Tensor]
    k: Factor
    c: Factor


def batches(
    lists: Sequence[Sequence[Tensor] | None],
    adam: Sequence[Adam] | None = None,
    mask: Sequence[bool] | None = None,
    *,
    written: int = 0,
) -> Iterator[Batch]:
    """The tensors of `direction.entries` that have elements, in batches.

    Raises:
        ValueError: as there.
    """
    groups: dict[Any, list[Entry]] = {}
    for entry in entries(lists, adam, mask, written=written):
        given = [x for x in entry.arrays if x is not None]
        one = entry.adam
        # A correction on the host is a number in the operation; those on the device are vectors of one.
        kind = None if one is None else (one.b2, one.eps, one.current, _on_host(one.correction))
        groups.setdefault((given[0].device, *(x.dtype for x in given), kind), []).append(entry)
    for group in groups.values():
        batch: list[Entry] = []
        elements = 0
        for entry in group:
            for arrays in pieces(entry.arrays):
                piece = entry._replace(arrays=arrays)
                elements += _elements(piece)
                if batch and elements > PIECE:
                    yield _batch(batch)
                    batch, elements = [], _elements(piece)
                batch.append(piece)
        if batch:
            yield _batch(batch)


def directions(g: list[Tensor], v: list[Tensor] | None, adam: list[Adam] | None, clip: Factor) -> Directions:
    """d / k of one batch. `d` or `g` are the caller's own tensors where there is nothing to compute."""
    accum = accum_dtype(g[0].dtype)
    g = upcast(g, accum)
    if v is None or adam is None:
        return Directions(g, g, clip, clip)
    if isinstance(clip, Tensor) or clip != 1:
        g = list(torch._foreach_mul(g, clip.to(g[0].device, accum) if isinstance(clip, Tensor) else clip))
    first, v = adam[0], upcast(v, accum)
    if not first.current:
        root = torch._foreach_sqrt(v)
    elif not first.b2:
        root = torch._foreach_abs(g)
    else:
        root = torch._foreach_addcmul(v, g, g, value=(1 - first.b2) / first.b2)
        torch._foreach_sqrt_(root)
    k, shift = _factors(adam, accum, g[0].device)
    torch._foreach_add_(root, shift)
    return Directions(list(torch._foreach_div(g, root)), g, k, 1.0)


def sums(found: Directions, gradient: bool) -> list[Tensor]:
    """[Σ d², Σ g d[, Σ g²]] of each tensor, without the factors, each [tensors] in float64."""
    square = _norms(found.d).square()
    if found.d is found.g:
        return [square] * (3 if gradient else 2)
    # d has the signs of g, so no product is negative.
    dot = _norms(torch._foreach_mul(found.d, found.g), 1)
    return [square, dot, _norms(found.g).square()] if gradient else [square, dot]


def upcast(xs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a wider dtype, in new arrays where they are not of it."""
    if all(x.dtype == dtype for x in xs):
        return list(xs)
    found = [torch.empty_like(x, dtype=dtype) for x in xs]
    torch._foreach_copy_(found, list(xs))
    return found


def _factors(adam: list[Adam], accum: torch.dtype, home: torch.device) -> tuple[Factor, Any]:
    """(k, k δ: a number, or one for each tensor, on the host or on the device as the corrections are)."""
    first = adam[0]
    below = first.b2 if first.current and first.b2 else 1.0
    if _on_host(first.correction):
        k = [math.sqrt(float(one.correction) / below) for one in adam]
        if len(set(k)) == 1:
            return k[0], k[0] * first.eps
        k_T = torch.tensor(k, dtype=torch.float64).to(home, non_blocking=True)
        return k_T, [x * first.eps for x in k]
    k_T = (torch.stack([torch.as_tensor(one.correction) for one in adam]) / below).sqrt().double()
    return k_T, list((k_T * first.eps).to(accum).unbind())


def _norms(xs: Sequence[Tensor], order: int = 2) -> Tensor:
    return torch.stack(torch._foreach_norm(list(xs), order)).double()


def _on_host(x: Factor) -> bool:
    return not isinstance(x, Tensor) or x.device.type == "cpu"


def _batch(found: list[Entry]) -> Batch:
    columns = tuple(None if x[0] is None else list(x) for x in zip(*(entry.arrays for entry in found), strict=True))
    adam = [entry.adam for entry in found if entry.adam is not None]
    return Batch([entry.place for entry in found], columns, adam or None)


def _elements(entry: Entry) -> int:
    return next(x for x in entry.arrays if x is not None).numel()
