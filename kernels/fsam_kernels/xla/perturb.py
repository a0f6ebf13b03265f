"""The perturbed weights of a whole tree."""

from __future__ import annotations

from typing import Any

import jax

from fsam_kernels.xla.direction import Adam, direction


def perturb(
    theta: Any,
    g: Any,
    v: Any | None,
    scale: jax.Array,
    *,
    clip: jax.Array | float = 1.0,
    adam: Adam | None = None,
) -> Any:
    """θ + scale · d, a tree like `theta`; added in float32 and rounded once, to the dtype of each leaf.

    Args:
        theta: tree of weights.
        g, v, clip, adam: as in `preconditioned_norm`.
        scale: ρ / ‖d‖₂ or ρ / sqrt(gᵀ d), a scalar.
    """

    def leaf(theta: jax.Array, g: jax.Array, v: jax.Array | None = None) -> jax.Array:
        d = direction(g, v, adam, clip)
        return (theta.astype(d.dtype) + scale.astype(d.dtype) * d).astype(theta.dtype)

    return jax.tree.map(leaf, theta, g) if v is None else jax.tree.map(leaf, theta, g, v)
