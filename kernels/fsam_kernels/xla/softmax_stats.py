"""What happens to a chunk of logits between the matrix products: row statistics and the cotangent.

`linear_cross_entropy` and `logit_vjp` put the gradients' matrix products, which XLA does best, behind a module like
this one: this one in the `xla` backend, `fsam_kernels.pallas.softmax_stats` in the `pallas` backend. `SoftmaxOps` says
what such a module offers. Formulas in `fsam_kernels.spec`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fsam_kernels.options import Loss
from fsam_kernels.xla import chunks


class Rows(NamedTuple):
    """A row's loss, lse, and what its cotangent is recomputed from; all in float32 (float64 for float64 logits).

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; scale = target = 0 where the row is ignored.
    """

    loss_C: jax.Array
    lse_C: jax.Array
    top_C: jax.Array
    scale_C: jax.Array
    target_C: jax.Array


class SoftmaxOps(Protocol):
    """What a backend's `softmax_stats` module offers; the contracts are those of the functions in this module.

    `tiles` stand for what a backend's own forward pass leaves of a chunk's logits, here the logits themselves.
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
    ) -> tuple[Rows, Any]: ...

    @property
    def scaled_operand(self) -> Callable[..., tuple[jax.Array, jax.Array | None]]: ...

    @property
    def scaled_kept(self) -> Callable[..., tuple[jax.Array, jax.Array | None]]: ...

    @property
    def keep(self) -> Callable[..., Any]: ...

    def chunk_count(self, N: int, V: int, itemsize: int, chunk_bytes: int | None, *, keep: bool) -> int: ...


def forward(
    h_CxD: jax.Array, w_VxD: jax.Array, bias_V: jax.Array | None, labels_C: jax.Array, loss: Loss, *, tiles: bool
) -> tuple[Rows, Any]:
    """(the rows' figures, what `operand` makes P of or None). Here that is the logits u themselves.

    A label ≥ V gives a NaN loss, which the step then skips, instead of the loss of another token.
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
    return row_figures(top_C, sum_C, others_C, gap_C, z_CxV.mean(axis=-1) if s else None, labels_C, V, loss), (
        u_CxV if tiles else None
    )


def row_figures(
    top_C: jax.Array,
    sum_C: jax.Array,
    others_C: jax.Array,
    gap_C: jax.Array,
    mean_C: jax.Array | None,
    labels_C: jax.Array,
    V: int,
    loss: Loss,
) -> Rows:
    """A row's loss and coefficients, from what one pass over its logits z leaves.

    Args:
        top_C: max_v z_v.
        sum_C, others_C: Σ exp(z − top) with and without the target column; the same where the row is ignored.
        gap_C: z_y − top, 0 where the row is ignored.
        mean_C: mean_v z_v, needed under label smoothing only.
        labels_C: negative where the row is ignored.
        V: size of the vocabulary.
    """
    s, seen_C = loss.label_smoothing, labels_C >= 0
    # Where the row is sure, sum is 1 + others and rounds to 1; log1p keeps the others, and so the loss's digits.
    log_sum_C = jnp.where(seen_C, jnp.log1p(others_C + jnp.expm1(gap_C)), jnp.log(sum_C))
    lse_C = top_C + log_sum_C
    loss_C, r = log_sum_C - gap_C, 2 * loss.z_loss * lse_C
    if mean_C is not None:
        loss_C = (1 - s) * loss_C + s * (log_sum_C + top_C - mean_C)
    if loss.z_loss:
        loss_C = loss_C + loss.z_loss * lse_C**2
    target_C = r - (1 + r) * (others_C / sum_C) + (s - loss.floor(V))
    of_seen = lambda x_C: jnp.where(seen_C, x_C, 0)
    return Rows(of_seen(loss_C), lse_C, top_C, of_seen((1 + r) / sum_C), of_seen(target_C))


def operand(u_CxV: Any, rows: Rows, labels_C: jax.Array, loss: Loss, dtype: Any) -> jax.Array:
    """P_CxV, the cotangent of unweighted rows, in `dtype`: elementwise, so that XLA can fuse it into a product."""
    e_CxV = jnp.exp(capped(u_CxV, loss) - rows.top_C[:, None])
    return assemble(e_CxV * rows.scale_C[:, None], rows, labels_C, loss).astype(dtype)


def keep(u_CxV: Any, rows: Rows, labels_C: jax.Array, loss: Loss, dtype: Any) -> jax.Array:
    """What a cotangent that is kept holds: P, in the dtype the products take it in."""
    return operand(u_CxV, rows, labels_C, loss, dtype)


def scaled_operand(u_CxV: Any, rows: Rows, labels_C: jax.Array, loss: Loss, dtype: Any) -> tuple[jax.Array, None]:
    """(Q_CxV, a factor for each row or None for 1) with P = factor Q."""
    return operand(u_CxV, rows, labels_C, loss, dtype), None


def scaled_kept(kept_CxV: Any, rows: Rows, labels_C: jax.Array, loss: Loss, dtype: Any) -> tuple[jax.Array, None]:
    """`scaled_operand` from what `keep` returned."""
    return kept_CxV.astype(dtype), None


def chunk_count(N: int, V: int, itemsize: int, chunk_bytes: int | None, *, keep: bool) -> int:
    """Chunks for N rows of a device: a row has its float32 logits and the operand that is made of them."""
    return chunks.count(N, V * (4 + itemsize), chunk_bytes)


def assemble(p_CxV: jax.Array, rows: Rows, labels_C: jax.Array, loss: Loss) -> jax.Array:
    """Scaled exponentials with what label smoothing takes off them, and the target column in its place."""
    V = p_CxV.shape[1]
    if loss.label_smoothing:
        p_CxV = p_CxV - jnp.where(labels_C >= 0, loss.floor(V), 0.0).astype(p_CxV.dtype)[:, None]
    return jnp.where(is_target(labels_C, V), rows.target_C[:, None], p_CxV)


def through_cap(p_CxV: jax.Array, u_CxV: jax.Array, loss: Loss) -> jax.Array:
    """P times the soft-cap's derivative 1 − tanh²(u / c); P where there is no cap."""
    if loss.soft_cap is None:
        return p_CxV
    return (p_CxV * (1 - jnp.tanh(u_CxV / loss.soft_cap) ** 2)).astype(p_CxV.dtype)


def logits(h_CxD: jax.Array, w_VxD: jax.Array, bias_V: jax.Array | None = None) -> jax.Array:
    """h Wᵀ + b from W in the dtype of h, accumulated and returned in float32 (float64 for float64 h)."""
    dtype = wide(h_CxD)
    w_VxD = w_VxD.astype(h_CxD.dtype)
    u_CxV = jax.lax.dot_general(h_CxD, w_VxD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return u_CxV if bias_V is None else u_CxV + bias_V.astype(dtype)


def capped(u_CxV: jax.Array, loss: Loss) -> jax.Array:
    """z = c tanh(u / c) under a soft-cap c, else u."""
    return u_CxV if loss.soft_cap is None else loss.soft_cap * jnp.tanh(u_CxV / loss.soft_cap)


def is_target(labels_C: jax.Array, V: int) -> jax.Array:
    """[v = y] for every row and column."""
    return jax.lax.broadcasted_iota(jnp.int32, (len(labels_C), V), 1) == labels_C.astype(jnp.int32)[:, None]


def wide(x: jax.Array) -> Any:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
