"""The ascent direction of one leaf, shared by the norm and the perturbation; formulas in `fsam_kernels.spec`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Adam(NamedTuple):
    """What the direction takes from AdamW: β₂, its eps, and the 1 − β₂ᵗ of the moment that is used."""

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
    moment = adam.b2 * v + (1 - adam.b2) * jnp.square(g) if adam.current else v
    return g / (jnp.sqrt(moment / adam.correction) + adam.eps)
