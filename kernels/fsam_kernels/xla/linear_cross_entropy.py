"""Cross entropy of a linear head, and the logit cotangent in a form that can be applied more than once."""

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
from fsam_kernels.xla.softmax_stats import Rows, SoftmaxOps, wide


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangent:
    """z̄ = weights P, in a form that any head can be pulled back through, more than once.

    P_v = scale exp(z_v − top) − s/V off the target and P_y = target, with z from (h, W, b). Either what P is recomputed
    from is held, N·D + 5N values (the head weight is the parameter itself), or P in the dtype of h, which is what the
    matrix products would round it to anyway (`kept`: what the backend's `rows.keep` makes of each chunk, stacked),
    and the head is None.
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
        """The same with other row weights."""
        return dataclasses.replace(self, weights_N=weights_N)

    @property
    def rows(self) -> Rows:
        """The figures of all rows; loss and lse are not kept, and not needed any more."""
        return Rows(self.top_N, self.top_N, self.top_N, self.scale_N, self.target_N)


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
    wide_wbar: bool = False,
    chunk_bytes: int | None = None,
    row_axes: tuple[str, ...] = (),
    softmax: SoftmaxOps = plain,
) -> tuple[jax.Array, jax.Array, Cotangent, HeadGradients | None]:
    """(loss_N, lse_N, the cotangent of Σ_n weight_n loss_n, it pulled back through this same head or None).

    With `gradient` the head's gradients are formed while a chunk's logits exist, which saves the ordinary backward pass
    one matrix product. Formulas in `spec.linear_cross_entropy` and `spec.logit_vjp`.

    Args:
        h_NxD: last hidden states, any float dtype; the products are taken in it.
        w_VxD: head weight; a head stored as [D, V] is given transposed. Given in float32 beside a narrower h, w̄ comes
            back as it was summed, not rounded.
        labels_N: integers; a negative one makes its row ignored. One ≥ V gives a NaN loss.
        weights_N: weight of each row in the mean, already divided by its normaliser.
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        keep: hold P for a second pull-back: N·V values in the dtype of h, and one matrix product less there.
        wide_wbar: return w̄ and b̄ as they were summed, in float32, and not in the dtypes of w and b.
        chunk_bytes: rows are taken in chunks whose logits fill about this much, so that no N×V array is ever whole;
            None for the platform's default. Their number changes nothing beyond rounding.
        row_axes: axes of the mesh in use (`jax.set_mesh`) that N is sharded over; chunks are then counted for each
            device, and a backend's own kernels run on each device's rows.
        softmax: how logits become row figures and P: the `softmax_stats` module of a backend.

    Returns:
        loss_N and lse_N in float32 (float64 for float64 input); h̄, w̄ and b̄ in the dtypes of h, w and b, each summed
        over chunks in float32.
    """
    N, V = len(h_NxD), len(w_VxD)
    m = softmax.chunk_count(N // chunks.shards(row_axes), V, h_NxD.dtype.itemsize, chunk_bytes, keep=keep)
    forward, strided = placed(softmax, row_axes)
    split, join = partial(chunks.split, m=m, strided=strided), partial(chunks.join, N=N, strided=strided)
    dtype = wide(h_NxD)
    weights_N = jnp.where(labels_N >= 0, weights_N, 0).astype(dtype)
    sums = Sums(h_NxD, w_VxD, bias_V, weights_N, wide_wbar, chunks.summing(N, m, row_axes))

    def one(total: Any, chunk: Any) -> Any:
        h_CxD, labels_C, weights_C = chunk
        rows, tiles = forward(h_CxD, w_VxD, bias_V, labels_C, loss, tiles=gradient or keep)
        held = (tiles, rows, labels_C, loss, h_NxD.dtype)
        hbar_CxD = None
        if gradient:
            q_CxV, factor_C = softmax.scaled_operand(*held)
            moved_CxV = plain.logits(h_CxD, w_VxD, bias_V) if loss.soft_cap is not None else q_CxV
            q_CxV = plain.through_cap(q_CxV, moved_CxV, loss)
            total, hbar_CxD = sums.add(total, q_CxV, factor_C, h_CxD, weights_C)
        return total, (rows, hbar_CxD, softmax.keep(*held) if keep else None)

    pieces = split(h_NxD), split(labels_N, fill=-1), split(weights_N)
    total, (rows, hbar, kept) = chunks.each(one, sums.zero() if gradient else (), pieces)
    figures = Rows(*(join(x) for x in rows))
    h, w, b = (None, None, None) if keep else (h_NxD, w_VxD, bias_V)
    _, _, top_N, scale_N, target_N = figures
    cotangent = Cotangent(h, w, b, top_N, scale_N, target_N, labels_N, weights_N, kept, loss)
    gradients = sums.result(total, join(hbar)) if gradient else None
    return figures.loss_C, figures.lse_C, cotangent, gradients


def placed(softmax: SoftmaxOps, row_axes: tuple[str, ...]) -> tuple[Callable[..., Any], bool]:
    """(`softmax.forward`, whether chunks take rows in strides), as the two passes of a head both have it.

    A backend's own kernels run on one device's rows, or on each device's through `row_axes`.
    """
    if softmax is plain:
        return softmax.forward, True
    return chunks.on_each_device(softmax.forward, row_axes), bool(row_axes)


class Sums:
    """h̄ = weights (P W), and w̄ = Pᵀ (weights h), b̄ = Pᵀ weights, summed chunk by chunk in float32 or float64.

    Row weights are applied on the narrow side, D values a row and not V, and relative to the largest: 1/N times a
    probability is below what half floats hold. Rows that are sharded over `row_axes` are summed by each device of them
    for itself, in arrays with a first axis of devices, and over the devices once, after the last chunk.
    """

    def __init__(
        self,
        h_NxD: jax.Array,
        w_VxD: jax.Array,
        bias_V: jax.Array | None,
        weights_N: jax.Array,
        wide_wbar: bool,
        row_axes: tuple[str, ...] = (),
    ) -> None:
        self.wide_wbar, self.row_axes, self.devices = wide_wbar, row_axes, chunks.shards(row_axes)
        self.h_dtype, self.w_VxD, self.bias_V, self.dtype = h_NxD.dtype, w_VxD, bias_V, wide(h_NxD)
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
        # Behind a barrier: XLA would fuse it into the product and make it again for every block, 5 % of that (v5e).
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
        scaled = lambda x, like: (x * self.unit).astype(x.dtype if self.wide_wbar else like.dtype)
        bbar_V = None if bbar_V is None else scaled(bbar_V, self.bias_V)
        return HeadGradients(hbar_NxD, scaled(wbar_VxD, self.w_VxD), bbar_V)
