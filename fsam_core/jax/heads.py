"""Heads in JAX: the return values of `features`, their loss, and the logit cotangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from fsam_core.errors import UserError
from fsam_core.heads import check
from fsam_kernels.memory import Memory
from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss
from fsam_kernels.xla.chunks import shards


@dataclass(frozen=True)
class LinearHead:
    """A model's hidden states and head weight; the loss is the weighted mean cross entropy of their product.

    Attributes:
        hidden: [..., D] last hidden states, any float dtype.
        weight: [V, D] the head's weight, a function of the params (tied to the embedding or not).
        labels: [...] integers; a token with a negative label is ignored.
        token_weights: [...] weight of each label in the mean, or None for 1.
        bias: [V] added to the logits, or None.
        layout: "DV" for a weight stored as [D, V].
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is also ignored (the padding token, say).
    """

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array
    token_weights: jax.Array | None = None
    bias: jax.Array | None = None
    layout: Layout = "VD"
    loss: Loss = CROSS_ENTROPY
    ignore_index: int | None = None


@dataclass(frozen=True)
class Logits:
    """The output of a model without a linear head.

    Attributes:
        logits: array of any shape, a function of the params.
        loss: logits -> mean loss, a scalar; it must not depend on the params in any other way.
        weight: the weight of this micro-batch among others (its number of targets, say).
    """

    logits: jax.Array
    loss: Callable[[jax.Array], jax.Array]
    weight: jax.Array | float = 1.0


def flat(head: Any) -> Any:
    """Check the head and flatten its leading axes; its weight becomes [V, D], missing token weights become 1."""
    if isinstance(head, Logits):
        return head
    if not isinstance(head, LinearHead):
        raise UserError(f"features must return a LinearHead or Logits, got {type(head).__name__}")
    check(head)
    y, weights = head.labels.reshape(-1).astype(jnp.int32), head.token_weights
    if head.ignore_index is not None:
        y = jnp.where(y == head.ignore_index, -1, y)
    kind = jnp.promote_types(head.hidden.dtype, jnp.float32)
    weights = jnp.ones(y.shape, kind) if weights is None else weights.reshape(-1).astype(kind)
    return dataclasses.replace(
        head,
        hidden=head.hidden.reshape(-1, head.hidden.shape[-1]),
        weight=head.weight if head.layout == "VD" else head.weight.T,
        labels=y,
        token_weights=jnp.where(y >= 0, weights, 0),
        layout="VD",
    )


def outputs(head: LinearHead | Logits) -> tuple[jax.Array, ...]:
    """The arrays that depend on the params: (hidden, weight[, bias]) or (logits,)."""
    if isinstance(head, Logits):
        return (head.logits,)
    return (head.hidden, head.weight) if head.bias is None else (head.hidden, head.weight, head.bias)


def with_outputs(head: LinearHead | Logits, out: tuple[jax.Array, ...]) -> LinearHead | Logits:
    """The head with other arrays as its `outputs`."""
    if isinstance(head, Logits):
        return dataclasses.replace(head, logits=out[0])
    return dataclasses.replace(head, hidden=out[0], weight=out[1], bias=out[2] if len(out) > 2 else None)


def cotangent(
    ops: ModuleType, head: LinearHead | Logits, memory: Memory, *, gradient: bool, keep: bool
) -> tuple[jax.Array, jax.Array, Any, tuple[jax.Array, ...] | None]:
    """(mean loss, weight, z̄, its vjp at `outputs` or None) of one micro-batch; loss 0 if all labels are ignored."""
    if isinstance(head, Logits):
        loss, zbar = jax.value_and_grad(head.loss)(head.logits)
        weight = jnp.asarray(head.weight, loss.dtype)
        # A mean over no targets is 0/0; its weight is 0.
        loss, zbar = (jnp.where(weight > 0, x, 0) for x in (loss, zbar))
        return loss, weight, zbar, (zbar.astype(head.logits.dtype),)
    assert head.token_weights is not None
    weight = jnp.sum(head.token_weights)
    share_N = head.token_weights / jnp.where(weight > 0, weight, 1)
    loss_N, _, zbar, gradients = ops.linear_cross_entropy(
        head.hidden,
        head.weight,
        head.labels,
        share_N,
        bias_V=head.bias,
        loss=head.loss,
        gradient=gradient,
        keep=keep,
        chunk_bytes=memory.chunk_bytes,
        row_axes=memory.row_axes,
    )
    return jnp.sum(loss_N * share_N), weight, zbar, None if gradients is None else _present(gradients)


def head_vjp(
    ops: ModuleType, head: LinearHead | Logits, zbar: Any, share: jax.Array, memory: Memory
) -> tuple[jax.Array, ...]:
    """The vjp at this head's `outputs` of `share` times the cotangent of a head with the same shapes."""
    if isinstance(head, Logits):
        return ((zbar * share.astype(zbar.dtype)).astype(head.logits.dtype),)
    zbar = zbar.reweighted(zbar.weights_N * share.astype(zbar.weights_N.dtype))
    options = {"bias_V": head.bias, "chunk_bytes": memory.chunk_bytes, "row_axes": memory.row_axes}
    return _present(ops.logit_vjp(zbar, head.hidden, head.weight, **options))


def keeps(head: LinearHead | Logits, micro_batches: int, memory: Memory) -> bool:
    """Whether the cotangents of `micro_batches` micro-batches like this one are kept for a second pass."""
    if isinstance(head, Logits):
        return False
    N = len(head.hidden) // shards(memory.row_axes) * micro_batches
    return memory.keeps(N, len(head.weight), head.hidden.dtype.itemsize)


def _present(gradients: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    return tuple(x for x in gradients if x is not None)
