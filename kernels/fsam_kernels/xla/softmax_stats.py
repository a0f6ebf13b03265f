"""From a chunk of hidden states to row statistics and the cotangent.

`linear_cross_entropy` and `logit_vjp` leave the gradients' matrix products to XLA and take the rest from a module with
the functions of `SoftmaxOps`: this module in the `xla` backend, `fsam_kernels.pallas.softmax_stats` in the `pallas`
backend. Formulas: `fsam_kernels.spec`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fsam_kernels.options import Loss
from fsam_kernels.xla import chunks


class RowStats(NamedTuple):
    """Each row's loss, lse, and the three numbers that give its cotangent; float32 (float64 for float64 logits).

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; scale = target = 0 on an ignored row.
    """

    loss_C: jax.Array
    lse_C: jax.Array
    top_C: jax.Array
    scale_C: jax.Array
    target_C: jax.Array


class SoftmaxOps(Protocol):
    """The functions of a backend's `softmax_stats` module; the contracts are those of the functions in this module.

    The PyTorch protocol of the same name starts from logits. Here `forward` also takes the product h Wᵀ, because the
    Pallas kernel fuses it. `state` is what a backend's forward pass stores of a chunk's logits for the cotangent: the
    logits themselves here, exponentials in Pallas. Its name therefore differs, and such parameters are positional.
    """

    def forward(
        self,
        h_CxD: jax.Array,
        w_VxD: jax.Array,
        bias_V: jax.Array | None,
        labels_C: jax.Array,
        loss: Loss,
        *,
        tiles: bool,
    ) -> tuple[RowStats, Any]: ...

    def scaled_operand(
        self, state: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any, /
    ) -> tuple[jax.Array, jax.Array | None]: ...

    def keep(self, state: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any, /) -> Any: ...

    def scaled_kept(
        self, kept: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any, /
    ) -> tuple[jax.Array, jax.Array | None]: ...

    def chunk_count(self, N: int, V: int, itemsize: int, chunk_bytes: int | None, *, keep: bool) -> int: ...


def forward(
    h_CxD: jax.Array, w_VxD: jax.Array, bias_V: jax.Array | None, labels_C: jax.Array, loss: Loss, *, tiles: bool
) -> tuple[RowStats, Any]:
    """(the rows' statistics, the input of `operand` or None without `tiles`). Here that input is the logits u.

    A label ≥ V gives a NaN loss, so that the step is skipped instead of using another token's loss.
    """
    u_CxV = logits(h_CxD, w_VxD, bias_V)
    z_CxV = capped(u_CxV, loss)
    V, s, seen_C = z_CxV.shape[1], loss.label_smoothing, labels_C >= 0
    is_target_CxV = is_target(labels_C, V)
    top_C = z_CxV.max(axis=-1)
    e_CxV = jnp.exp(z_CxV - top_C[:, None])
    others_C = jnp.sum(jnp.where(is_target_CxV, 0, e_CxV), axis=-1)
    target_C = jnp.take_along_axis(z_CxV, jnp.maximum(labels_C, 0)[:, None], axis=-1, mode="fill")[:, 0]
    gap_C = jnp.where(seen_C, target_C - top_C, 0)  # 0 where the target is the row's largest
    sum_C = others_C + jnp.where(seen_C, jnp.exp(gap_C), 0)
    return row_stats(top_C, sum_C, others_C, gap_C, z_CxV.mean(axis=-1) if s else None, labels_C, V, loss), (
        u_CxV if tiles else None
    )


def row_stats(
    top_C: jax.Array,
    sum_C: jax.Array,
    others_C: jax.Array,
    gap_C: jax.Array,
    mean_C: jax.Array | None,
    labels_C: jax.Array,
    V: int,
    loss: Loss,
) -> RowStats:
    """A row's loss and coefficients, from the results of one pass over its logits z.

    Args:
        top_C: max_v z_v.
        sum_C, others_C: Σ exp(z − top) with and without the target column; the same where the row is ignored.
        gap_C: z_y − top, 0 where the row is ignored.
        mean_C: mean_v z_v, required under label smoothing.
        labels_C: negative where the row is ignored.
        V: size of the vocabulary.
    """
    s, seen_C = loss.label_smoothing, labels_C >= 0
    # On a confident row, sum = 1 + others rounds to 1. log1p(others) keeps the digits of others, and so of the loss.
    log_sum_C = jnp.where(seen_C, jnp.log1p(others_C + jnp.expm1(gap_C)), jnp.log(sum_C))
    lse_C = top_C + log_sum_C
    loss_C, r = log_sum_C - gap_C, 2 * loss.z_loss * lse_C
    if mean_C is not None:
        loss_C = (1 - s) * loss_C + s * (log_sum_C + top_C - mean_C)
    if loss.z_loss:
        loss_C = loss_C + loss.z_loss * lse_C**2
    target_C = r - (1 + r) * (others_C / sum_C) + (s - loss.floor(V))
    or_zero = lambda x_C: jnp.where(seen_C, x_C, 0)
    return RowStats(or_zero(loss_C), lse_C, top_C, or_zero((1 + r) / sum_C), or_zero(target_C))


def operand(u_CxV: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> jax.Array:
    """P_CxV, the cotangent of unweighted rows, in `dtype`: elementwise, so that XLA can fuse it into a product."""
    e_CxV = jnp.exp(capped(u_CxV, loss) - rows.top_C[:, None])
    return assemble(e_CxV * rows.scale_C[:, None], rows, labels_C, loss).astype(dtype)


def keep(u_CxV: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> jax.Array:
    """What a kept cotangent stores: P, in the dtype of the products."""
    return operand(u_CxV, rows, labels_C, loss, dtype)


def scaled_operand(u_CxV: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> tuple[jax.Array, None]:
    """(Q_CxV, one factor a row or None for 1) with P = factor Q."""
    return operand(u_CxV, rows, labels_C, loss, dtype), None


def scaled_kept(kept_CxV: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> tuple[jax.Array, None]:
    """`scaled_operand` from the result of `keep`."""
    return kept_CxV.astype(dtype), None


def chunk_count(N: int, V: int, itemsize: int, chunk_bytes: int | None, *, keep: bool) -> int:
    """The number of chunks for N rows of a device: a row has float32 logits and the operand computed from them."""
    return chunks.count(N, V * (4 + itemsize), chunk_bytes)


def assemble(p_CxV: jax.Array, rows: RowStats, labels_C: jax.Array, loss: Loss) -> jax.Array:
    """P from scaled exponentials: subtract label smoothing's s/V and insert the target column."""
    V = p_CxV.shape[1]
    if loss.label_smoothing:
        p_CxV = p_CxV - jnp.where(labels_C >= 0, loss.floor(V), 0.0).astype(p_CxV.dtype)[:, None]
    return jnp.where(is_target(labels_C, V), rows.target_C[:, None], p_CxV)


def through_cap(p_CxV: jax.Array, u_CxV: jax.Array, loss: Loss) -> jax.Array:
    """P times the soft-cap's derivative 1 − tanh²(u / c); P itself without a cap."""
    if loss.soft_cap is None:
        return p_CxV
    return (p_CxV * (1 - jnp.tanh(u_CxV / loss.soft_cap) ** 2)).astype(p_CxV.dtype)


def logits(h_CxD: jax.Array, w_VxD: jax.Array, bias_V: jax.Array | None = None) -> jax.Array:
    """h Wᵀ + b from W in the dtype of h, accumulated and returned in float32 (float64 for float64 h)."""
    dtype = accum_dtype(h_CxD)
    w_VxD = w_VxD.astype(h_CxD.dtype)
    u_CxV = jax.lax.dot_general(h_CxD, w_VxD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return u_CxV if bias_V is None else u_CxV + bias_V.astype(dtype)


def capped(u_CxV: jax.Array, loss: Loss) -> jax.Array:
    """z = c tanh(u / c) under a soft-cap c, else u."""
    return u_CxV if loss.soft_cap is None else loss.soft_cap * jnp.tanh(u_CxV / loss.soft_cap)


def is_target(labels_C: jax.Array, V: int) -> jax.Array:
    """[v = y] for every row and column."""
    return jax.lax.broadcasted_iota(jnp.int32, (len(labels_C), V), 1) == labels_C.astype(jnp.int32)[:, None]


def accum_dtype(x: jax.Array) -> Any:
    """The dtype of sums: float64 for float64, else float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
