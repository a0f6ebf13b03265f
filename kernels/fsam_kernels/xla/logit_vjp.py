"""The logit cotangent contracted with a head: the same one, or the head at the perturbed weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fsam_kernels.xla.linear_cross_entropy import Cotangent, logits


def logit_vjp(cotangent: Cotangent, h_NxD: jax.Array, w_VxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(h̄_NxD, w̄_VxD) = (z̄ W, z̄ᵀ h), accumulated in float32 and returned in the dtypes of h and w."""
    zbar_NxV = logit_cotangent(cotangent)
    accumulate = zbar_NxV.dtype
    zbar_NxV = zbar_NxV.astype(jnp.promote_types(h_NxD.dtype, w_VxD.dtype))
    hbar_NxD = jax.lax.dot_general(zbar_NxV, w_VxD, (((1,), (0,)), ((), ())), preferred_element_type=accumulate)
    wbar_VxD = jax.lax.dot_general(zbar_NxV, h_NxD, (((0,), (0,)), ((), ())), preferred_element_type=accumulate)
    return hbar_NxD.astype(h_NxD.dtype), wbar_VxD.astype(w_VxD.dtype)


def logit_cotangent(cotangent: Cotangent) -> jax.Array:
    """z̄_NxV itself, by the formulas of `Cotangent`: p_y − 1 is never formed by subtraction."""
    z_NxV = logits(cotangent.h_NxD, cotangent.w_VxD)
    e_NxV = jnp.exp(z_NxV - cotangent.top_N[:, None])
    weights_Nx1 = cotangent.weights_N[:, None]
    is_target_NxV = jax.lax.broadcasted_iota(jnp.int32, z_NxV.shape, 1) == cotangent.labels_N[:, None]
    miss_Nx1 = cotangent.miss_N[:, None]
    return jnp.where(is_target_NxV, -miss_Nx1 * weights_Nx1, e_NxV * (weights_Nx1 / cotangent.sum_N[:, None]))
