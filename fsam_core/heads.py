"""Checks of heads that both frameworks share: shapes, the layout of the weight, the factors of several heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fsam_core.errors import UserError
from fsam_core.split import IsKey, no_key, rows_of


def check_shapes(head: Any) -> None:
    """Check a LinearHead's shapes: [..., D], [V, D] or [D, V], [...], [...] or None, [V] or None.

    Raises:
        UserError: naming the argument and the shapes.
    """
    if head.layout not in ("VD", "DV"):
        raise UserError(f"LinearHead: layout must be 'VD' or 'DV', got {head.layout!r}")
    h, w, y = tuple(head.hidden.shape), tuple(head.weight.shape), tuple(head.labels.shape)
    weights = None if head.token_weights is None else tuple(head.token_weights.shape)
    if y != h[:-1] or weights not in (None, y):
        got = f"hidden {h}, labels {y}, token_weights {weights}"
        raise UserError(f"LinearHead: labels and token_weights must have hidden's leading axes, got {got}")
    vocabulary, features = (0, 1) if head.layout == "VD" else (1, 0)
    if len(w) != 2 or w[features] != h[-1]:
        wanted = f"[V, {h[-1]}]" if head.layout == "VD" else f"[{h[-1]}, V] with layout='DV'"
        hint = "; is it stored the other way round (layout)?" if len(w) == 2 and w[vocabulary] == h[-1] else ""
        raise UserError(f"LinearHead: weight must be {wanted}, got {w}{hint}")
    if head.bias is not None and tuple(head.bias.shape) != (w[vocabulary],):
        raise UserError(f"LinearHead: bias must be [{w[vocabulary]}], got {tuple(head.bias.shape)}")


def check_heads(head: Any) -> list[Any]:
    """The factors of a Heads' heads.

    Raises:
        UserError: for no head, Heads in Heads, or another number of weights than of heads.
    """
    count = len(head.heads)
    if not count or any(isinstance(x, type(head)) for x in head.heads):
        raise UserError(
            f"Heads: give at least one LinearHead, Outputs or Logits, and no Heads in it; got {count} heads"
        )
    if head.weights is None:
        return [1.0] * count
    if len(head.weights) != count:
        raise UserError(f"Heads: weights must have one number a head, got {len(head.weights)} for {count} heads")
    return list(head.weights)


def of_batch(head: Any, batch: Any, is_key: IsKey = no_key) -> Any:
    """The head of this batch, whose rows are the weight of `Outputs` and `Logits` that none was given for."""
    rows = rows_of(batch, is_key)

    def weighed(one: Any) -> Any:
        if hasattr(one, "heads"):
            return dataclasses.replace(one, heads=[weighed(x) for x in one.heads])
        return dataclasses.replace(one, weight=rows) if getattr(one, "weight", rows) is None else one

    return weighed(head)


def check_outputs(ndims: Iterable[int]) -> None:
    """Check that a method which holds the outputs' cotangent has outputs, and not the loss in their place.

    Raises:
        UserError: for scalars alone.
    """
    if not any(ndims):
        raise UserError(
            "Outputs: the output is a scalar, the loss itself, whose derivative is 1 at any weights; return the "
            "logits, and their loss as a function of them, or use SAM"
        )
