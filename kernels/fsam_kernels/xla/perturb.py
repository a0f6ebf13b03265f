"""The perturbed weights θ + ε of a tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.xla.direction import Adam, direction, leaves, moving


def perturb(
    theta: Any,
    g: Any,
    v: Any | None,
    scale: Any,
    *,
    clip: jax.Array | float = 1.0,
    adam: Adam | None = None,
    mask: Any | None = None,
    dtype: Any = None,
) -> Any:
    """θ + scale · d, a tree like `theta`; added in float32 and rounded once to `dtype`.

    Nothing needs to be restored: θ is not modified. Within a program XLA holds the result for as long as the second
    pass reads it: 4 bytes a float32 weight, or 2 where `dtype` is bfloat16 and θ the float32 masters.

    Args:
        theta: tree of weights.
        g, v, clip, adam: as in `preconditioned_norm`.
        scale: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d), a scalar, or a tree of scalars like `theta`.
        mask: tree of True and False like `theta`. A leaf whose mask is False is returned as the same array (cast where
            `dtype` differs), so that XLA recognises it and runs what depends on nothing else once.
        dtype: dtype of the result; None for each leaf's own.

    Raises:
        ValueError: for a tree that is not like `theta`, or a mask with leaves other than True and False.
    """
    weights, tree = jax.tree.flatten(theta)
    grads = leaves("g", g, theta)
    moments = [None] * len(weights) if v is None else leaves("v", v, theta)
    scales = [scale] * len(weights) if jax.tree_util.all_leaves([scale]) else leaves("scale", scale, theta)

    def leaf(theta: jax.Array, g: jax.Array, v: jax.Array | None, scale: Any, moves: bool) -> jax.Array:
        kind = dtype or theta.dtype
        if not moves:
            return theta if theta.dtype == kind else theta.astype(kind)
        d = direction(g, v, adam, clip)
        return (theta.astype(d.dtype) + jnp.asarray(scale, d.dtype) * d).astype(kind)

    rows = zip(weights, grads, moments, scales, moving(mask, theta), strict=True)
    return jax.tree.unflatten(tree, [leaf(*row) for row in rows])
