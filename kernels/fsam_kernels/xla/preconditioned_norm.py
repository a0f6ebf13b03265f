"""‖d‖² and gᵀd over a tree of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.xla.direction import Adam, direction, leaves, moving
from fsam_kernels.xla.softmax_stats import accum_dtype


def preconditioned_norm(
    g: Any,
    v: Any | None = None,
    *,
    clip: jax.Array | float = 1.0,
    adam: Adam | None = None,
    mask: Any | None = None,
    per_tensor: bool = False,
) -> tuple[Any, Any]:
    """(Σ d², Σ (c g) d): two scalars in the widest leaf dtype, at least float32, or two trees of such scalars.

    Args:
        g: tree of gradients.
        v: tree of AdamW second moments of the same structure, or None for d = c g.
        clip: the factor c that gradient clipping would apply to g.
        adam: required with `v`.
        mask: tree of True and False like `g`; a leaf whose mask is False counts 0.
        per_tensor: return one sum for each leaf, as trees like `g`.

    Raises:
        ValueError: for a tree that is not like `g`, or a mask with leaves other than True and False.
    """
    grads, tree = jax.tree.flatten(g)
    moments = [None] * len(grads) if v is None else leaves("v", v, g)
    each = [
        _sums(leaf, moment, clip, adam) if moves else (jnp.zeros((), accum_dtype(leaf)),) * 2
        for leaf, moment, moves in zip(grads, moments, moving(mask, g), strict=True)
    ]
    columns = list(zip(*each, strict=True)) if each else [(), ()]
    if per_tensor:
        sumsq, dot = (jax.tree.unflatten(tree, column) for column in columns)
    else:
        sumsq, dot = (sum(column, jnp.zeros((), jnp.float32)) for column in columns)
    return sumsq, dot


def _sums(g: jax.Array, v: jax.Array | None, clip: jax.Array | float, adam: Adam | None) -> tuple[jax.Array, jax.Array]:
    d = direction(g, v, adam, clip)
    return jnp.sum(jnp.square(d)), jnp.sum(clip * g.astype(d.dtype) * d)
