"""The loss of a linear head as one differentiable function, for use outside the step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss, Reduction, check_reduction
from fsam_kernels.xla import softmax_stats as plain
from fsam_kernels.xla.linear_cross_entropy import linear_cross_entropy
from fsam_kernels.xla.logit_vjp import logit_vjp
from fsam_kernels.xla.softmax_stats import SoftmaxOps, accum_dtype


def cross_entropy(
    h: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    bias_V: jax.Array | None = None,
    loss: Loss = CROSS_ENTROPY,
    reduction: Reduction = "mean",
    count: jax.Array | float | None = None,
    ignore_index: int | None = None,
    layout: Layout = "VD",
    chunk_bytes: int | None = None,
    row_axes: tuple[str, ...] = (),
    softmax: SoftmaxOps = plain,
) -> jax.Array:
    """Cross entropy of the logits h Wᵀ + b, differentiable in h, w and bias; no N×V array is allocated.

    Reduced to a scalar, the loss and its gradient cost three matrix products. With reduction="none" the backward pass
    recomputes the logits, which makes four. Formulas: `spec.linear_cross_entropy` and `spec.reduce`.

    Args:
        h: [..., D] hidden states.
        w: [V, D] head weight, or [D, V] with layout="DV".
        labels: [...] integers; a token whose label is negative or `ignore_index` is ignored.
        weights: [...] constant weight of each token; None for 1. Not with reduction="none".
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        reduction: "none" for [...]; "sum" of the weighted losses; "mean" for that sum over the sum of the weights.
        count: the divisor of a "mean" instead (the tokens of all micro-batches and devices, say).
        chunk_bytes, row_axes, softmax: as in `linear_cross_entropy`.

    Raises:
        ValueError: for an unknown reduction, or weights or a count that the reduction does not use.
    """
    check_reduction(reduction, weights is not None, count is not None)
    w_VxD = w if layout == "VD" else w.T
    y_N = labels.reshape(-1).astype(jnp.int32)
    if ignore_index is not None:
        y_N = jnp.where(y_N == ignore_index, -1, y_N)
    h_NxD = h.reshape(-1, h.shape[-1])
    statics = (("loss", loss), ("chunk_bytes", chunk_bytes), ("row_axes", row_axes), ("softmax", softmax))
    if reduction == "none":
        return _rows(statics, h_NxD, w_VxD, bias_V, y_N).reshape(labels.shape)
    ones_N = jnp.ones(y_N.shape, accum_dtype(h))
    weights_N = jnp.where(y_N >= 0, ones_N if weights is None else weights.reshape(-1).astype(ones_N.dtype), 0)
    if reduction == "mean":
        total = jnp.sum(weights_N) if count is None else jnp.asarray(count, ones_N.dtype)
        weights_N = weights_N / jnp.where(total == 0, 1, total)
    weights_N = jax.lax.stop_gradient(weights_N)
    if h_NxD.dtype != jnp.float16:
        return _total(statics, h_NxD, w_VxD, bias_V, y_N, weights_N)
    # 1/N rounds small gradients to 0 before a loss scale is known, so they are in units of the largest weight.
    largest = jnp.max(jnp.abs(weights_N), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return _total(statics, h_NxD, w_VxD, bias_V, y_N, weights_N / unit) * unit


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(statics: Any, h_NxD: Any, w_VxD: Any, bias_V: Any, labels_N: Any, weights_N: Any) -> jax.Array:
    loss_N, *_ = linear_cross_entropy(h_NxD, w_VxD, labels_N, weights_N, bias_V=bias_V, **dict(statics))
    return jnp.sum(loss_N * weights_N)


def _total_forward(statics: Any, h_NxD: Any, w_VxD: Any, bias_V: Any, labels_N: Any, weights_N: Any) -> Any:
    options = {"bias_V": bias_V, "gradient": True, "upcast_wbar": h_NxD.dtype == jnp.float16, **dict(statics)}
    loss_N, *_, gradients = linear_cross_entropy(h_NxD, w_VxD, labels_N, weights_N, **options)
    none_of = jax.tree.map(lambda x: jnp.zeros((), x.dtype), (h_NxD, w_VxD, bias_V))
    assert gradients is not None
    return jnp.sum(loss_N * weights_N), (tuple(gradients), none_of)


def _total_backward(statics: Any, saved: Any, g: jax.Array) -> Any:
    return (*jax.tree.map(lambda x, like: (x * g).astype(like.dtype), *saved), None, None)


_total.defvjp(_total_forward, _total_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(statics: Any, h_NxD: Any, w_VxD: Any, bias_V: Any, labels_N: Any) -> jax.Array:
    return _rows_forward(statics, h_NxD, w_VxD, bias_V, labels_N)[0]


def _rows_forward(statics: Any, h_NxD: Any, w_VxD: Any, bias_V: Any, labels_N: Any) -> Any:
    ones_N = jnp.ones(labels_N.shape, accum_dtype(h_NxD))
    loss_N, _, cotangent, _ = linear_cross_entropy(h_NxD, w_VxD, labels_N, ones_N, bias_V=bias_V, **dict(statics))
    return loss_N, cotangent


def _rows_backward(statics: Any, cotangent: Any, g_N: jax.Array) -> Any:
    options = {name: value for name, value in statics if name != "loss"}  # the cotangent has its own
    weights_N = (cotangent.weights_N * g_N).astype(cotangent.weights_N.dtype)
    head = cotangent.h_NxD, cotangent.w_VxD
    return (*logit_vjp(cotangent.reweighted(weights_N), *head, bias_V=cotangent.bias_V, **options), None)


_rows.defvjp(_rows_forward, _rows_backward)
