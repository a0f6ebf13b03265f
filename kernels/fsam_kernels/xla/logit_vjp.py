"""The vjp of a linear head with a given logit cotangent: at the same weights, or at the perturbed ones."""

from __future__ import annotations

from typing import Any

import jax

from fsam_kernels.xla import chunks
from fsam_kernels.xla import softmax_stats as plain
from fsam_kernels.xla.linear_cross_entropy import Cotangent, HeadGradients, Sums, placed
from fsam_kernels.xla.softmax_stats import RowStats, SoftmaxOps


def logit_vjp(
    cotangent: Cotangent,
    h_NxD: jax.Array,
    w_VxD: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    upcast_wbar: bool = False,
    chunk_bytes: int | None = None,
    row_axes: tuple[str, ...] = (),
    softmax: SoftmaxOps = plain,
) -> HeadGradients:
    """(h̄_NxD, w̄_VxD, b̄_V) of `spec.logit_vjp`; w̄ and b̄ are summed in float32, all in the dtypes of h, w and b.

    A kept cotangent costs the two matrix products and nothing else, unless there is a soft-cap, whose derivative is
    taken at this head. Otherwise the cotangent is recomputed from its own head, chunk by chunk, as in the first pass.

    Args:
        h_NxD, w_VxD, bias_V: the head, with the shapes of the head of the cotangent; `bias_V` if and only if that head
            had a bias.
        upcast_wbar, chunk_bytes, row_axes, softmax: as in `linear_cross_entropy`, and the same as there.
    """
    base, N, V = cotangent, len(h_NxD), len(w_VxD)
    if base.kept is None:
        m = softmax.chunk_count(N // chunks.shards(row_axes), V, h_NxD.dtype.itemsize, chunk_bytes, keep=False)
    else:
        m = len(jax.tree.leaves(base.kept)[0])
    forward, strided = placed(softmax, row_axes)
    sums = Sums(h_NxD, w_VxD, bias_V, base.weights_N, upcast_wbar, chunks.summing(N, m, row_axes))

    def one(total: Any, chunk: Any) -> Any:
        h_CxD, weights_C, labels_C, rows, base_CxD, kept = chunk
        if base.w_VxD is not None:
            # `forward` also computes row statistics: a kernel hides them behind its product, XLA drops them as dead
            # code.
            _, tiles = forward(base_CxD, base.w_VxD, base.bias_V, labels_C, base.loss, tiles=True)
            q_CxV, factor_C = softmax.scaled_operand(tiles, rows, labels_C, base.loss, h_NxD.dtype)
        else:
            q_CxV, factor_C = softmax.scaled_kept(kept, rows, labels_C, base.loss, h_NxD.dtype)
        moved_CxV = plain.logits(h_CxD, w_VxD, bias_V) if base.loss.soft_cap is not None else q_CxV
        return sums.add(total, plain.through_cap(q_CxV, moved_CxV, base.loss), factor_C, h_CxD, weights_C)

    split = lambda x, fill=0: chunks.split(x, m, fill, strided=strided)
    rows = RowStats(*(split(x) for x in base.rows))
    base_mxCxD = None if base.h_NxD is None else split(base.h_NxD)
    pieces = (split(h_NxD), split(base.weights_N), split(base.labels_N, -1), rows, base_mxCxD, base.kept)
    if base.kept is not None and base.loss.soft_cap is None and not row_axes:
        # P is stored and no N×V array is computed, so one product for each gradient replaces m that add up w̄. Sharded
        # rows would have to change devices for it, because every device has a part of each chunk.
        pieces = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), pieces)
    total, hbar = chunks.each(one, sums.zero(), pieces)
    hbar_mxCxD = hbar.reshape(m, -1, hbar.shape[-1])
    return sums.result(total, chunks.join(hbar_mxCxD, N, strided=strided))
