"""‖d‖² and gᵀd over a whole tree of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.xla.direction import Adam, direction


def preconditioned_norm(
    g: Any, v: Any | None = None, *, clip: jax.Array | float = 1.0, adam: Adam | None = None
) -> tuple[jax.Array, jax.Array]:
    """(Σ d², Σ (c g) d), two scalars in the widest leaf dtype, at least float32.

    Args:
        g: tree of gradients.
        v: tree of AdamW second moments of the same structure, or None for d = c g.
        clip: the factor c that gradient clipping would apply to g.
        adam: needed with `v`.
    """
    leaves = jax.tree.leaves(g)
    moments = [None] * len(leaves) if v is None else jax.tree.leaves(v)
    sumsq = dot = jnp.zeros((), jnp.float32)
    for leaf, moment in zip(leaves, moments, strict=True):
        d = direction(leaf, moment, adam, clip)
        sumsq += jnp.sum(jnp.square(d))
        dot += jnp.sum(clip * leaf.astype(d.dtype) * d)
    return sumsq, dot
