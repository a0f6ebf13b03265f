"""The loss of a linear head as one differentiable function, for use outside the step.

It is a custom operator with its own backward pass, so `torch.compile` sees one node and does not break the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss, Reduction, check_reduction
from fsam_kernels.torch.linear_cross_entropy import Cotangent, HeadGradients, compute_dtype, linear_cross_entropy
from fsam_kernels.torch.logit_vjp import logit_vjp
from fsam_kernels.torch.softmax_stats import accum_dtype, softmax_ops


def cross_entropy(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    bias_V: Tensor | None = None,
    loss: Loss = CROSS_ENTROPY,
    reduction: Reduction = "mean",
    count: Tensor | float | None = None,
    ignore_index: int | None = None,
    layout: Layout = "VD",
    chunk_bytes: int | None = None,
    softmax: str = "torch",
) -> Tensor:
    """Cross entropy of the logits h Wᵀ + b, differentiable in h, w and bias; no N×V tensor is allocated.

    Reduced to a scalar, the loss and its gradient cost three matrix products; the forward pass computes both. With
    reduction="none" the backward pass recomputes the logits, which makes four. Formulas: `spec.linear_cross_entropy`
    and `spec.reduce`. Under autocast it computes in autocast's dtype, as a linear layer does.

    Args:
        h: [..., D] hidden states.
        w: [V, D] head weight, or [D, V] with layout="DV".
        labels: [...] int64; a token whose label is negative or `ignore_index` is ignored.
        weights: [...] constant weight of each token; None for 1. Not with reduction="none".
        bias_V: added to the logits, or None.
        loss: label smoothing, z-loss, soft-cap.
        reduction: "none" for [...]; "sum" of the weighted losses; "mean" for that sum over the sum of the weights.
        count: the divisor of a "mean" instead (the tokens of all micro-batches and ranks, say).
        chunk_bytes: as in `linear_cross_entropy`.
        softmax: the backend of the work between the matrix products: "torch" or "triton".

    Raises:
        ValueError: for an unknown reduction, or weights or a count that the reduction does not use.
        RuntimeError: in a backward pass with create_graph=True, because it has no second derivative; in forward-mode
            differentiation.
    """
    check_reduction(reduction, weights is not None, count is not None)
    head = [x for x in (h, w, bias_V) if x is not None]
    _refuse_tangents(head)
    h_NxD = h.reshape(-1, h.shape[-1]).to(compute_dtype(h))
    w_VxD = w if layout == "VD" else w.T
    y_N = labels.reshape(-1)
    if ignore_index is not None:
        y_N = y_N.masked_fill(y_N == ignore_index, -1)
    options = (loss.label_smoothing, loss.z_loss, loss.soft_cap, chunk_bytes, softmax)
    if reduction == "none":
        return _rows(h_NxD, w_VxD, bias_V, y_N, *options)[0].reshape(labels.shape)
    dtype = accum_dtype(h_NxD)
    given_N = torch.ones_like(y_N, dtype=dtype) if weights is None else weights.detach().reshape(-1).to(dtype)
    weights_N = torch.where(y_N >= 0, given_N, 0)
    if reduction == "mean":
        total = weights_N.sum() if count is None else torch.as_tensor(count, dtype=dtype, device=h.device)
        weights_N = weights_N / torch.where(total == 0, 1, total)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in head)
    if h_NxD.dtype != torch.float16:
        return _total(h_NxD, w_VxD, bias_V, y_N, weights_N, gradient, *options)[0]
    # 1/N rounds small gradients to 0 before a loss scale is known, so they are in units of the largest weight.
    largest = weights_N.abs().max() if weights_N.numel() else weights_N.new_zeros(())
    unit = torch.where(largest > 0, largest, 1)
    return _total(h_NxD, w_VxD, bias_V, y_N, weights_N / unit, gradient, *options)[0] * unit


@torch.library.custom_op("fsam::cross_entropy_total", mutates_args=())
def _total(
    h_NxD: Tensor,
    w_VxD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor,
    gradient: bool,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    chunk_bytes: int | None,
    softmax: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Σ_n weight_n loss_n, h̄, w̄, b̄); h̄, w̄ and b̄ are empty without `gradient`.

    Of float16 hidden states w̄ and b̄ are sums of many tokens in units that may be large, and stay in float32.
    """
    loss_N, *_, gradients = linear_cross_entropy(
        h_NxD,
        w_VxD,
        labels_N,
        weights_N,
        bias_V=bias_V,
        loss=Loss(label_smoothing, z_loss, soft_cap),
        gradient=gradient,
        upcast_wbar=h_NxD.dtype == torch.float16,
        chunk_bytes=chunk_bytes,
        softmax=softmax_ops(softmax),
    )
    total = (loss_N * weights_N).sum()
    if gradients is None:
        return total, h_NxD.new_empty(0), h_NxD.new_empty(0), h_NxD.new_empty(0)
    return total, *_without_none(gradients)


@_total.register_fake
def _(h_NxD, w_VxD, bias_V, labels_N, weights_N, gradient, *options):
    empty = lambda: h_NxD.new_empty(0)
    if not gradient:
        return weights_N.new_empty(()), empty(), empty(), empty()
    wide = torch.float32 if h_NxD.dtype == torch.float16 else None
    bbar = empty() if bias_V is None else torch.empty_like(bias_V, dtype=wide)
    return weights_N.new_empty(()), torch.empty_like(h_NxD), torch.empty_like(w_VxD, dtype=wide), bbar


def _total_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _refuse_tangents(given: list[Tensor]) -> None:
    """A custom operator drops tangents without a word: the derivative would be 0."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise RuntimeError(
            "cross_entropy has no forward-mode derivative; use torch.nn.functional.cross_entropy of the logits"
        )


def _refuse_second_derivatives() -> None:
    """Gradients that a forward pass computes have no graph: a derivative of them would lack most of its terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy has no second derivative, which create_graph=True asks for; use "
            "torch.nn.functional.cross_entropy of the logits"
        )


def _total_backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    rest = (None,) * 8
    if g is None:
        return (None, None, None, *rest)
    # A loss scale of 65536 is infinite in float16, so the product is taken in float32 there.
    scaled = lambda x: x.float() * g if x.dtype == torch.float16 else x * g.to(x.dtype)
    found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return (*(None if dtype is None else scaled(x).to(dtype) for x, dtype in found), *rest)


_total.register_autograd(_total_backward, setup_context=_total_setup)


@torch.library.custom_op("fsam::cross_entropy_rows", mutates_args=())
def _rows(
    h_NxD: Tensor,
    w_VxD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    chunk_bytes: int | None,
    softmax: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_N, and top_N, scale_N, target_N to recompute the cotangent from)."""
    loss_N, _, cotangent, _ = linear_cross_entropy(
        h_NxD,
        w_VxD,
        labels_N,
        torch.ones_like(labels_N, dtype=accum_dtype(h_NxD)),
        bias_V=bias_V,
        loss=Loss(label_smoothing, z_loss, soft_cap),
        chunk_bytes=chunk_bytes,
        softmax=softmax_ops(softmax),
    )
    return loss_N, cotangent.top_N, cotangent.scale_N, cotangent.target_N


@_rows.register_fake
def _(h_NxD, w_VxD, bias_V, labels_N, *options):
    return tuple(torch.empty_like(labels_N, dtype=accum_dtype(h_NxD)) for _ in range(4))


def _rows_setup(ctx: Any, inputs: Any, output: Any) -> None:
    h_NxD, w_VxD, bias_V, labels_N, *ctx.options = inputs
    ctx.save_for_backward(h_NxD, w_VxD, bias_V, labels_N, *output[1:])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, g_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    rest = (None,) * 6
    if g_N is None:
        return (None, None, None, *rest)
    h_NxD, w_VxD, bias_V, *saved = ctx.saved_tensors
    hbar_NxD, wbar_VxD, bbar_V = _rows_vjp(h_NxD, w_VxD, bias_V, *saved, g_N, *ctx.options)
    return (hbar_NxD, wbar_VxD, None if bias_V is None else bbar_V, *rest)


_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


@torch.library.custom_op("fsam::cross_entropy_rows_backward", mutates_args=())
def _rows_vjp(
    h_NxD: Tensor,
    w_VxD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    top_N: Tensor,
    scale_N: Tensor,
    target_N: Tensor,
    g_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    chunk_bytes: int | None,
    softmax: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h̄, w̄, b̄) for per-row losses whose cotangents are g_N."""
    weights_N = torch.where(labels_N >= 0, g_N, 0).to(accum_dtype(h_NxD))
    loss = Loss(label_smoothing, z_loss, soft_cap)
    cotangent = Cotangent(h_NxD, w_VxD, bias_V, top_N, scale_N, target_N, labels_N, weights_N, None, loss)
    gradients = logit_vjp(cotangent, h_NxD, w_VxD, bias_V=bias_V, chunk_bytes=chunk_bytes, softmax=softmax_ops(softmax))
    return _without_none(gradients)


@_rows_vjp.register_fake
def _(h_NxD, w_VxD, bias_V, *rest):
    bbar_V = h_NxD.new_empty(0) if bias_V is None else torch.empty_like(bias_V)
    return torch.empty_like(h_NxD), torch.empty_like(w_VxD), bbar_V


def _without_none(gradients: HeadGradients) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors only: an empty one stands for a bias that does not exist."""
    hbar_NxD, wbar_VxD, bbar_V = gradients
    return hbar_NxD, wbar_VxD, hbar_NxD.new_empty(0) if bbar_V is None else bbar_V
