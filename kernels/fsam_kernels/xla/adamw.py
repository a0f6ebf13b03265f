"""The AdamW update of a whole tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Updated(NamedTuple):
    """Trees like the weights; `copy` is None where no compute copy is asked for."""

    theta: Any
    exp_avg: Any
    exp_avg_sq: Any
    copy: Any = None


def adamw(
    theta: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    step: jax.Array | int,
    lr: jax.Array | float,
    b1: jax.Array | float = 0.9,
    b2: jax.Array | float = 0.999,
    eps: jax.Array | float = 1e-8,
    weight_decay: Any = 1e-2,
    clip: jax.Array | float = 1.0,
    copy_dtype: Any = None,
) -> Updated:
    """The weights and moments after step `step` = 1, 2, …, in float32 arithmetic, each rounded to the dtype it came in.

        m ← β₁ m + (1 − β₁) c g,   v ← β₂ v + (1 − β₂) (c g)²,   θ ← (1 − lr λ) θ − lr m̂ / (sqrt(v̂) + ε)

    XLA fuses a leaf's update into one loop. It is in place if `theta`, `exp_avg` and `exp_avg_sq` are donated.

    Args:
        theta, g, exp_avg, exp_avg_sq: trees of the same structure.
        step: a number or a traced scalar.
        weight_decay: λ, a number or a tree of numbers like `theta`.
        clip: the factor c of gradient clipping.
        copy_dtype: also return the new weights in this dtype, rounded once from float32.
    """
    leaves, tree = jax.tree.flatten(theta)
    others = [jax.tree.leaves(x) for x in (g, exp_avg, exp_avg_sq)]
    one = isinstance(weight_decay, float | int | jax.Array)
    decays = [weight_decay] * len(leaves) if one else jax.tree.leaves(weight_decay)
    # 1 − βᵗ is −expm1(t log β): in float32, 1 − βᵗ of a β near 1 would lose most digits.
    t = jnp.asarray(step, jnp.float32)
    first, second = (-jnp.expm1(t * jnp.log(jnp.asarray(b, jnp.float32))) for b in (b1, b2))

    def update(theta: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, decay: Any) -> tuple[jax.Array, ...]:
        accum = jnp.promote_types(theta.dtype, jnp.float32)
        weight, g, m_new, v_new = (x.astype(accum) for x in (theta, g, m, v))
        g = g * jnp.asarray(clip, accum)
        m_new = b1 * m_new + (1 - b1) * g
        v_new = b2 * v_new + (1 - b2) * jnp.square(g)
        # Not (1 − lr λ) θ: the rounding error of that factor is the same at every step, and accumulates.
        weight = weight - lr * ((m_new / first) / (jnp.sqrt(v_new / second) + eps) + decay * weight)
        written = (weight.astype(theta.dtype), m_new.astype(m.dtype), v_new.astype(v.dtype))
        return written if copy_dtype is None else (*written, weight.astype(copy_dtype))

    rows = [update(*row) for row in zip(leaves, *others, decays, strict=True)]
    columns = zip(*rows, strict=True) if rows else [[]] * (3 if copy_dtype is None else 4)
    return Updated(*(jax.tree.unflatten(tree, list(x)) for x in columns))
