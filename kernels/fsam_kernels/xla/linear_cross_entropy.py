"""Cross entropy of a linear head, and its logit cotangent in a form that can be applied more than once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.xla import chunks
from fsam_kernels.xla import softmax_stats as plain
from fsam_kernels.xla.softmax_stats import RowStats, SoftmaxOps, accum_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangent:
    """z̄ = weights P, in a form that `logit_vjp` can apply to any head, more than once.

    P_v = scale exp(z_v − top) − s/V off the target and P_y = target, with z from (h, W, b). A recomputed cotangent
    stores (h, W, b) and the row statistics, N·D + 5N values (the head weight is the parameter itself). A kept one
    stores P in the dtype of h, to which the matrix products would round it anyway (`kept`: the result of the backend's
    `keep` for each chunk, stacked); h, W and b are then None.
    """

    h_NxD: jax.Array | None
    w_VxD: jax.Array | None
    bias_V: jax.Array | None
    top_N: jax.Array
    scale_N: jax.Array
    target_N: jax.Array
    labels_N: jax.Array
    weights_N: jax.Array
    kept: Any
    loss: Loss = field(metadata={"static": True})

    def reweighted(self, weights_N: jax.Array) -> Cotangent:
        """The same cotangent with other row weights."""
        return dataclasses.replace(self, weights_N=weights_N)

    @property
    def rows(self) -> RowStats:
        """The statistics of all rows; loss and lse are not stored, because nothing needs them."""
        return RowStats(self.top_N, self.top_N, self.top_N, self.scale_N, self.target_N)


class HeadGradients(NamedTuple):
    """The cotangents of a head's hidden states, weight and bias (None where it has none)."""

    hbar_NxD: jax.Array
    wbar_VxD: jax.Array
    bbar_V: jax.Array | None


def linear_cross_entropy(
    h_NxD: jax.Array,
    w_VxD: jax.Array,
    labels_N: jax.Array,
    weights_N: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    loss: Loss = CROSS_ENTROPY,
    gradient: bool = False,
    keep: bool = False,
    upcast_wbar: bool = False,
    chunk_bytes: int | None = None,
    row_axes: tuple[str, ...] = (),
    softmax: SoftmaxOps = plain,
) -> tuple[jax.Array, jax.Array, Cotangent, HeadGradients | None]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n, its vjp through this same head or None).

    With `gradient` the head's gradients are computed while a chunk's logits exist, which saves the ordinary backward
    pass one matrix product. Formulas: `spec.linear_cross_entropy` and `spec.logit_vjp`.

    Args:
        h_NxD: last hidden states, any float dtype, which is also the dtype of the products.
        w_VxD: head weight; pass a weight stored as [D, V] transposed. For a float32 weight with a half-precision h, w̄
            is returned in float32, as it was summed.
        labels_N: integers; a row with a negative label is ignored. A label ≥ V gives a NaN loss.
        weights_N: weight of each row in the mean, already divided by its normaliser.
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        keep: store P for a second vjp: N·V values in the dtype of h, and one matrix product fewer there.
        upcast_wbar: return w̄ and b̄ in float32, as they were summed, and not in the dtypes of w and b.
        chunk_bytes: rows are processed in chunks whose logits fill about this much, so that no N×V array is allocated;
            None for the platform's default. The number of chunks changes nothing beyond rounding.
        row_axes: the axes of the current mesh (`jax.set_mesh`) that N is sharded over. Chunks are then counted for each
            device, and a backend's own kernels run on each device's rows.
        softmax: the `softmax_stats` module of a backend, which turns logits into row statistics and P.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input); h̄, w̄ and b̄ in the dtypes of h, w and b. w̄ and b̄ are
        summed over chunks in float32.
    """
    N, V = len(h_NxD), len(w_VxD)
    m = softmax.chunk_count(N // chunks.shards(row_axes), V, h_NxD.dtype.itemsize, chunk_bytes, keep=keep)
    forward, strided = placed(softmax, row_axes)
    split, join = partial(chunks.split, m=m, strided=strided), partial(chunks.join, N=N, strided=strided)
    dtype = accum_dtype(h_NxD)
    weights_N = jnp.where(labels_N >= 0, weights_N, 0).astype(dtype)
    sums = Sums(h_NxD, w_VxD, bias_V, weights_N, upcast_wbar, chunks.summing(N, m, row_axes))

    def one(total: Any, chunk: Any) -> Any:
        h_CxD, labels_C, weights_C = chunk
        rows, tiles = forward(h_CxD, w_VxD, bias_V, labels_C, loss, tiles=gradient or keep)
        inputs = (tiles, rows, labels_C, loss, h_NxD.dtype)
        hbar_CxD = None
        if gradient:
            q_CxV, factor_C = softmax.scaled_operand(*inputs)
            moved_CxV = plain.logits(h_CxD, w_VxD, bias_V) if loss.soft_cap is not None else q_CxV
            q_CxV = plain.through_cap(q_CxV, moved_CxV, loss)
            total, hbar_CxD = sums.add(total, q_CxV, factor_C, h_CxD, weights_C)
        return total, (rows, hbar_CxD, softmax.keep(*inputs) if keep else None)

    pieces = split(h_NxD), split(labels_N, fill=-1), split(weights_N)
    total, (rows, hbar_mxCxD, kept) = chunks.each(one, sums.zero() if gradient else (), pieces)
    stats = RowStats(*(join(x) for x in rows))
    h, w, b = (None, None, None) if keep else (h_NxD, w_VxD, bias_V)
    _, _, top_N, scale_N, target_N = stats
    cotangent = Cotangent(h, w, b, top_N, scale_N, target_N, labels_N, weights_N, kept, loss)
    gradients = sums.result(total, join(hbar_mxCxD)) if gradient else None
    return stats.loss_C, stats.lse_C, cotangent, gradients


def placed(softmax: SoftmaxOps, row_axes: tuple[str, ...]) -> tuple[Callable[..., Any], bool]:
    """(`softmax.forward`, whether chunks are strided), the same for both passes of a head.

    A backend's own kernels run on one device's rows, or with `row_axes` on each device's.
    """
    if softmax is plain:
        return softmax.forward, True
    return chunks.on_each_device(softmax.forward, row_axes), bool(row_axes)


class Sums:
    """h̄ = weights (P W), and w̄ = Pᵀ (weights h), b̄ = Pᵀ weights, summed chunk by chunk in float32 or float64.

    Row weights multiply the tensors with D values a row, not those with V. They are divided by the largest weight
    (`unit`) first, because 1/N times a probability underflows in half precision. With rows sharded over `row_axes`,
    each device sums its own rows, in arrays with a first axis of devices; the devices are reduced once, after the last
    chunk.
    """

    def __init__(
        self,
        h_NxD: jax.Array,
        w_VxD: jax.Array,
        bias_V: jax.Array | None,
        weights_N: jax.Array,
        upcast_wbar: bool,
        row_axes: tuple[str, ...] = (),
    ) -> None:
        self.upcast_wbar, self.row_axes, self.devices = upcast_wbar, row_axes, chunks.shards(row_axes)
        self.h_dtype, self.w_VxD, self.bias_V, self.dtype = h_NxD.dtype, w_VxD, bias_V, accum_dtype(h_NxD)
        largest = jnp.max(jnp.abs(weights_N), initial=0)
        self.unit = jnp.where(largest > 0, largest, 1)

    def zero(self) -> tuple[jax.Array, jax.Array | None]:
        first = (self.devices,) if self.row_axes else ()
        zeros = lambda like: self._own(jnp.zeros((*first, *like.shape), self.dtype))
        return zeros(self.w_VxD), None if self.bias_V is None else zeros(self.bias_V)

    def add(
        self, total: Any, q_CxV: jax.Array, factor_C: jax.Array | None, h_CxD: jax.Array, weights_C: jax.Array
    ) -> tuple[Any, jax.Array]:
        """(the sums with one chunk's P = factor Q contracted, its h̄)."""
        wbar_VxD, bbar_V = total
        dot = lambda a, b, axis: jax.lax.dot_general(
            a, b, (((axis,), (0,)), ((), ())), preferred_element_type=self.dtype
        )
        weights_C = weights_C if factor_C is None else weights_C * factor_C
        hbar_CxD = dot(q_CxV, self.w_VxD.astype(q_CxV.dtype), 1)
        relative_C = weights_C / self.unit
        # The barrier keeps XLA from fusing this into the product and recomputing it for every block, 5 % of it (v5e).
        weighted_CxD = jax.lax.optimization_barrier((h_CxD * relative_C[:, None]).astype(q_CxV.dtype))
        over_rows = self._over_own_rows if self.row_axes else lambda a, b: dot(a, b, 0)
        wbar_VxD = wbar_VxD + over_rows(q_CxV, weighted_CxD)
        if bbar_V is not None:
            bbar_V = bbar_V + over_rows(q_CxV, relative_C.astype(q_CxV.dtype))
        return (wbar_VxD, bbar_V), (hbar_CxD * weights_C[:, None]).astype(self.h_dtype)

    def _over_own_rows(self, a_C: jax.Array, b_C: jax.Array) -> jax.Array:
        """Σ_c a_c b_c over each device's rows c: [devices, …]."""
        apart = lambda x_C: x_C.reshape(self.devices, -1, *x_C.shape[1:])
        sizes = (((1,), (1,)), ((0,), (0,)))
        return self._own(jax.lax.dot_general(apart(a_C), apart(b_C), sizes, preferred_element_type=self.dtype))

    def _own(self, x: jax.Array) -> jax.Array:
        return chunks.by_device(x, self.row_axes)

    def result(self, total: Any, hbar_NxD: jax.Array) -> HeadGradients:
        wbar_VxD, bbar_V = jax.tree.map(lambda x: x.sum(0), total) if self.row_axes else total
        scaled = lambda x, like: (x * self.unit).astype(x.dtype if self.upcast_wbar else like.dtype)
        bbar_V = None if bbar_V is None else scaled(bbar_V, self.bias_V)
        return HeadGradients(hbar_NxD, scaled(wbar_VxD, self.w_VxD), bbar_V)
