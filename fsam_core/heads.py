"""What the two frameworks' heads have in common: which shapes fit together."""

from __future__ import annotations

from typing import Any

from fsam_core.errors import UserError


def check_shapes(hidden: Any, weight: Any, labels: Any, token_weights: Any | None) -> None:
    """Whether the arrays of a LinearHead fit: [..., D], [V, D], [...] and [...] or None.

    Raises:
        UserError: naming the shapes.
    """
    h, w, y = tuple(hidden.shape), tuple(weight.shape), tuple(labels.shape)
    weights = None if token_weights is None else tuple(token_weights.shape)
    if y != h[:-1] or weights not in (None, y):
        got = f"hidden {h}, labels {y}, token_weights {weights}"
        raise UserError(f"LinearHead: labels and token_weights must have hidden's leading axes, got {got}")
    if len(w) != 2 or w[1] != h[-1]:
        raise UserError(f"LinearHead: weight must be [V, {h[-1]}], got {w}")
