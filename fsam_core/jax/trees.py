"""Trees of parameters: the names of their leaves, and the leaves that are no float arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsam_core.errors import UserError


def names(params: Any) -> list[str]:
    """The name of each leaf: its path, joined by dots, without that of a box around it (`flax.linen.Partitioned`)."""
    is_box = lambda x: hasattr(x, "unbox") and hasattr(x, "replace_boxed")
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    spelled = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return [spelled(path) for path, box in boxes for _ in jax.tree.leaves(box)]


def floats(params: Any, like: Any | None = None) -> Any:
    """`like`, a tree like `params` (None: `params` itself), with None in place of the leaves that cannot be trained.

    Raises:
        UserError: for a leaf that is complex, of fewer than 16 bits, or no array, and for a module of flax nnx.
    """
    if any(x.__module__.startswith("flax.nnx.") and x.__name__ == "Module" for x in type(params).__mro__):
        raise UserError(
            "params: an nnx.Module holds more than weights, and its state would be lost; give the params of "
            "nnx.split(module, nnx.Param, ...), and merge in features (docs/loops.md)"
        )
    for name, x in zip(names(params), jax.tree.leaves(params), strict=True):
        if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jnp.complexfloating):
            kind = getattr(x, "dtype", type(x).__name__)
            raise UserError(f"params: every leaf must be a real array, got {name or 'a leaf'} of type {kind}")
        if _trains(x) and jnp.finfo(x.dtype).bits < 16:
            raise UserError(
                f"params: {name or 'a leaf'} is of {x.dtype}, which takes no update; keep it wider and cast in features"
            )
    return jax.tree.map(lambda p, x: x if _trains(p) else None, params, params if like is None else like)


def joined(params: Any, trained: Any) -> Any:
    """`params` with the leaves of `trained`, as `floats` gives them, in place of its own."""
    return jax.tree.map(lambda p, x: p if x is None else x, params, trained)


def gradients(params: Any, trained: Any) -> Any:
    """The gradients `trained`, as `floats` leaves them, with a zero for each other leaf."""
    return jax.tree.map(lambda p, x: _zero(p) if x is None else x, params, trained)


def _trains(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _zero(x: Any) -> Any:
    """Zeros in the leaf's dtype, to which optax can add; a random key gets those of `jax.grad(allow_int=True)`."""
    extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return np.zeros(x.shape, jax.dtypes.float0) if extended else jnp.zeros_like(x)
