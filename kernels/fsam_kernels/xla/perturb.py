"""The perturbed weights of a whole tree."""

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
    """θ + scale · d, a tree like `theta`; added in float32 and rounded once, to the dtype that is asked for.

    Restoring: there is none, θ is left as it is. In one program XLA holds the result as long as the second pass reads
    it: 4 bytes a float32 weight, or 2 where `dtype` is bfloat16 and θ the float32 masters.

    Args:
        theta: tree of weights.
        g, v, clip, adam: as in `preconditioned_norm`.
        scale: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d), a scalar, or a tree of scalars like `theta`.
        mask: tree of True and False like `theta`. Of a leaf whose mask is False the very array that was given is
            returned (cast where `dtype` differs), so that XLA knows it for the unperturbed one and does what depends
            on nothing else once.
        dtype: of the result; each leaf's own without it.

    Raises:
        ValueError: for a tree that is not like `theta`, or a mask of anything but True and False.
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
