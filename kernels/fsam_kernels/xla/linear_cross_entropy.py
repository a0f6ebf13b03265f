"""Cross entropy of a linear head, and the logit cotangent in a form that can be applied more than once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cotangent(NamedTuple):
    """z̄ = weight (softmax(h Wᵀ) − onehot(y)), kept as what it is recomputed from: N·D + 5N values, not N·V.

    With e = exp(z − top) and miss = 1 − p_y, the share of the other columns:  z̄_v = weight e_v / sum,
    z̄_y = −weight miss.

    The head weight is the unperturbed parameter itself, so it costs no memory. Under one `jit` XLA recognises the
    recomputed logits as the forward pass's own and may keep them instead.
    """

    h_NxD: jax.Array
    w_VxD: jax.Array
    top_N: jax.Array
    sum_N: jax.Array
    miss_N: jax.Array
    labels_N: jax.Array
    weights_N: jax.Array


def linear_cross_entropy(
    h_NxD: jax.Array, w_VxD: jax.Array, labels_N: jax.Array, weights_N: jax.Array
) -> tuple[jax.Array, jax.Array, Cotangent]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n); formula in `spec.linear_cross_entropy`.

    Args:
        h_NxD: last hidden states, any float dtype.
        w_VxD: head weight.
        labels_N: integers; a negative one makes its row ignored. One ≥ V gives a NaN loss.
        weights_N: weight of each row in the mean, already divided by its normaliser.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input).
    """
    z_NxV = logits(h_NxD, w_VxD)
    is_target_NxV = jnp.arange(z_NxV.shape[1]) == labels_N[:, None]
    top_N = z_NxV.max(axis=-1)
    e_NxV = jnp.exp(z_NxV - top_N[:, None])
    others_N = jnp.sum(jnp.where(is_target_NxV, 0, e_NxV), axis=-1)
    # "fill" turns a label that is not in the vocabulary into NaN, which the step then skips, instead of another token.
    target_N = jnp.take_along_axis(z_NxV, jnp.maximum(labels_N, 0)[:, None], axis=-1, mode="fill")[:, 0]
    gap_N = jnp.where(labels_N >= 0, target_N - top_N, 0)  # 0 where the target is the row's largest
    e_target_N = jnp.where(labels_N >= 0, jnp.exp(gap_N), 0)
    sum_N = others_N + e_target_N
    # Where the row is sure, sum is 1 + others and rounds to 1; log1p keeps the others, and so the loss's digits.
    log_sum_N = jnp.where(labels_N >= 0, jnp.log1p(others_N + jnp.expm1(gap_N)), jnp.log(sum_N))
    lse_N = top_N + log_sum_N
    loss_N = jnp.where(labels_N >= 0, log_sum_N - gap_N, 0)
    weights_N = jnp.where(labels_N >= 0, weights_N, 0).astype(z_NxV.dtype)
    return loss_N, lse_N, Cotangent(h_NxD, w_VxD, top_N, sum_N, others_N / sum_N, labels_N, weights_N)


def logits(h_NxD: jax.Array, w_VxD: jax.Array) -> jax.Array:
    """h Wᵀ, accumulated and returned in float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(jnp.promote_types(h_NxD.dtype, w_VxD.dtype), jnp.float32)
    return jax.lax.dot_general(h_NxD, w_VxD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
