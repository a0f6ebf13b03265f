"""The ascent direction of one leaf, for the norm and the perturbation; formulas in `fsam_kernels.spec`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path


class Adam(NamedTuple):
    """AdamW's values in the direction: β₂, eps, and the bias correction 1 − β₂ᵗ of the moment that is used.

    With `jax_enable_x64` some may be float64, and the arrays of float32 leaves are float32 nevertheless.
    """

    b2: float | jax.Array
    eps: float | jax.Array
    correction: float | jax.Array
    current: bool = True


def direction(g: jax.Array, v: jax.Array | None, adam: Adam | None, clip: jax.Array | float) -> jax.Array:
    """d in float32 (float64 for float64 gradients): c g, or c g / (sqrt(v̂) + δ) where `v` is given."""
    g = clip * g.astype(jnp.promote_types(g.dtype, jnp.float32))
    if v is None or adam is None:
        return g
    v = v.astype(g.dtype)
    return g / (jnp.sqrt(second_moment(g, v, adam)) + jnp.asarray(adam.eps, g.dtype))


def second_moment(g: jax.Array, v: jax.Array, adam: Adam) -> jax.Array:
    """v̂, in the dtype of g and v."""
    at = lambda x: jnp.asarray(x, g.dtype)
    moment = at(adam.b2) * v + at(1 - adam.b2) * jnp.square(g) if adam.current else v
    return moment / at(adam.correction)


def leaves(name: str, tree: Any, like: Any) -> list[Any]:
    """The leaves of `tree`, which must have the structure of the tree `like`.

    Raises:
        ValueError: for another structure, naming the argument and the first leaf that is in only one of the two.
    """
    structure: Any = jax.tree.structure(tree)
    if structure != jax.tree.structure(like):
        mine, others = (dict.fromkeys(keystr(at) for at, _ in tree_leaves_with_path(x)) for x in (tree, like))
        lacks = [f"lacks {at or 'a leaf'}" for at in others if at not in mine]
        more = [f"has {at or 'one leaf'} besides" for at in mine if at not in others]
        why = (lacks + more or ["is made of other containers"])[0]
        raise ValueError(
            f"{name}: a tree like the other arguments is needed, with {len(others)} leaves; this one {why}"
        )
    return jax.tree.leaves(tree)


def moving(mask: Any, like: Any) -> list[bool]:
    """Which leaves are perturbed; without a mask all.

    Raises:
        ValueError: for a mask of another structure, or with leaves other than True and False: the mask must be known
            when the program is traced.
    """
    if mask is None:
        return [True] * len(jax.tree.leaves(like))
    found = leaves("mask", mask, like)
    for one in found:
        if not isinstance(one, bool | np.bool_):
            raise ValueError(f"mask: a tree of True and False is needed, got a {type(one).__name__} in it")
    return found
