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
    """z̄_NxV itself. Its target column is expm1(z_y − lse), not softmax − 1, so that a sure row keeps its digits."""
    s_NxV = logits(cotangent.h_NxD, cotangent.w_VxD) - cotangent.lse_N[:, None]
    target_NxV = jax.lax.broadcasted_iota(cotangent.labels_N.dtype, s_NxV.shape, 1) == cotangent.labels_N[:, None]
    return jnp.where(target_NxV, jnp.expm1(s_NxV), jnp.exp(s_NxV)) * cotangent.weights_N[:, None]
