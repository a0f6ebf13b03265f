"""Heads in JAX: the return values of `features`, their loss, and the logit cotangent.

`flat` turns what `features` returned into one form, a weighted sum of parts. Everything after it has one entry a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsam_core.errors import UserError
from fsam_core.heads import check_heads, check_shapes
from fsam_kernels.memory import Memory
from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss
from fsam_kernels.xla.chunks import shards


@dataclass(frozen=True)
class LinearHead:
    """A model's hidden states and head weight; the loss is the weighted mean cross entropy of their product.

    Attributes:
        hidden: [..., D] last hidden states, any float dtype.
        weight: [V, D] the head's weight, a function of the params (tied to the embedding or not).
        labels: [...] integers; a token with a negative label is ignored. A label ≥ V is an error where the labels are
            concrete; inside `jax.jit` the loss is then NaN, and `Info.bad_label` has the label.
        token_weights: [...] weight of each label in the mean, or None for 1.
        bias: [V] added to the logits, or None.
        layout: "DV" for a weight stored as [D, V].
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is also ignored (the padding token, say).
        count: scalar > 0 by which the weighted sum of the losses is divided, and the weight of this batch beside
            others; None for the sum of the token weights. Give it for token weights that may sum to 0 or less
            (advantages), computed from the batch that `features` is given, of which S is a part. Without it the loss
            of such a batch is NaN.
    """

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array
    token_weights: jax.Array | None = None
    bias: jax.Array | None = None
    layout: Layout = "VD"
    loss: Loss = CROSS_ENTROPY
    ignore_index: int | None = None
    count: jax.Array | float | None = None


@dataclass(frozen=True)
class Outputs:
    """What a model computes, and a loss of it alone.

    Attributes:
        outputs: a tree of arrays, functions of the params. Integer arrays in it are constants.
        loss: outputs -> mean loss, a scalar. It must reach the params only through `outputs`.
        weight: the weight ≥ 0 of this micro-batch, or of S, among others; None for the rows of the batch that
            `features` was given. A mean over some of its targets needs their number.
    """

    outputs: Any
    loss: Callable[[Any], jax.Array]
    weight: jax.Array | float | None = None


@dataclass(frozen=True)
class Logits:
    """`Outputs` of one array: the output of a model without a linear head.

    Attributes:
        logits: array of any shape, a function of the params.
        loss: logits -> mean loss, a scalar; it must not depend on the params in any other way.
        weight: the weight ≥ 0 of this micro-batch, or of S, among others; None for the rows of the batch that
            `features` was given. A mean over some of its targets needs their number.
    """

    logits: jax.Array
    loss: Callable[[jax.Array], jax.Array]
    weight: jax.Array | float | None = None


@dataclass(frozen=True)
class Heads:
    """A weighted sum of heads: several predictions, or auxiliary losses such as a router's load balancing.

    The method treats each head alike: it takes ∂L/∂outputs at θ and pulls it back at θ+ε. A micro-batch counts beside
    others, and S beside the rest, by the weight of the first head. That equals each head's own mean over all targets if
    the heads' numbers of targets are proportional. With cut="hidden", a `LinearHead` is cut at its hidden states and
    an `Outputs` at its outputs.

    Attributes:
        heads: `LinearHead`, `Outputs` or `Logits`, at least one.
        weights: the factor of each head's loss; None for 1.
    """

    heads: Sequence[Any]
    weights: Sequence[Any] | None = None


Head = LinearHead | Outputs | Logits | Heads
Part = LinearHead | Outputs


class FlatHeads(NamedTuple):
    """The result of `flat`. A `LinearHead` in it is [N, D], [V, D], [N], [N] and its `count` the mean's divisor; the
    `outputs` of an `Outputs` are a tuple of float arrays. `factors` has that of each part's loss in the sum."""

    parts: tuple[Part, ...]
    factors: tuple[Any, ...]


def flat(head: Any) -> FlatHeads:
    """Check what `features` returned, and bring it into one form.

    Raises:
        UserError: for what is no head, shapes that do not fit, or concrete labels ≥ V.
    """
    several = isinstance(head, Heads)
    heads, factors = (head.heads, check_heads(head)) if several else ([head], [1.0])
    return FlatHeads(tuple(map(_flat, heads)), tuple(factors))


def _flat(head: Any) -> Part:
    if isinstance(head, Logits):
        return _flat_outputs(Outputs(head.logits, head.loss, head.weight))
    if isinstance(head, Outputs):
        return _flat_outputs(head)
    if not isinstance(head, LinearHead):
        got = type(head).__name__
        raise UserError(f"features must return a LinearHead, Outputs, Logits or Heads, got {got}")
    return _flat_linear(head)


def _flat_outputs(head: Outputs) -> Outputs:
    leaves, tree = jax.tree.flatten(head.outputs)
    leaves = [jnp.asarray(x) for x in leaves]
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    if not any(is_float):
        raise UserError(f"Outputs: outputs must contain a float array, got {head.outputs!r}")

    def loss(given: tuple[jax.Array, ...]) -> jax.Array:
        rest = iter(given)
        return head.loss(
            jax.tree.unflatten(tree, [next(rest) if f else x for x, f in zip(leaves, is_float, strict=True)])
        )

    return Outputs(tuple(x for x, f in zip(leaves, is_float, strict=True) if f), loss, head.weight)


def _flat_linear(head: LinearHead) -> LinearHead:
    check_shapes(head)
    V = head.weight.shape[0 if head.layout == "VD" else 1]
    _check_labels(head.labels, V, head.ignore_index)
    y, weights = head.labels.reshape(-1).astype(jnp.int32), head.token_weights
    if head.ignore_index is not None:
        y = jnp.where(y == head.ignore_index, -1, y)
    kind = jnp.promote_types(head.hidden.dtype, jnp.float32)
    weights = jnp.ones(y.shape, kind) if weights is None else weights.reshape(-1).astype(kind)
    weights = jnp.where(y >= 0, weights, 0)
    count = jnp.sum(weights) if head.count is None else jnp.asarray(head.count, kind)
    if head.token_weights is not None or head.count is not None:
        # No mean is defined by a divisor that is not positive, unless there is nothing to divide.
        count = nan_unless((count > 0) | jnp.all(weights == 0), jnp.maximum(count, 0))
    return dataclasses.replace(
        head,
        hidden=head.hidden.reshape(-1, head.hidden.shape[-1]),
        weight=head.weight if head.layout == "VD" else head.weight.T,
        labels=y,
        token_weights=weights,
        layout="VD",
        count=count,
    )


@partial(jax.jit, inline=True)
def nan_unless(valid: jax.Array, x: jax.Array) -> jax.Array:
    """x, or NaN where it is not valid. Outside of `jax.jit`, `jax_debug_nans` would stop at the constant itself."""
    return jnp.where(valid, x, jnp.nan)


def _check_labels(labels: Any, vocabulary: int, ignore_index: int | None) -> None:
    if isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    found = np.asarray(labels).astype(np.int64)  # unsigned ones have no -1
    largest = found[found != ignore_index].max(initial=-1)
    if largest >= vocabulary:
        raise UserError(
            f"LinearHead: labels must be below V = {vocabulary}, the rows of the weight, or negative; got {largest}"
        )


def bad_label(head: FlatHeads) -> jax.Array:
    """The largest label ≥ V of a linear head, an int32 scalar; -1 if there is none."""
    found = [(jnp.max(x.labels, initial=-1), len(x.weight)) for x in head.parts if isinstance(x, LinearHead)]
    return reduce(jnp.maximum, [jnp.where(y >= V, y, -1) for y, V in found], jnp.int32(-1))


def outputs(head: FlatHeads) -> tuple[tuple[jax.Array, ...], ...]:
    """The arrays of each part that depend on the params: (hidden, weight[, bias]), or the outputs."""
    return tuple(_outputs(part) for part in head.parts)


def _outputs(part: Part) -> tuple[jax.Array, ...]:
    if isinstance(part, Outputs):
        return part.outputs
    return (part.hidden, part.weight) if part.bias is None else (part.hidden, part.weight, part.bias)


def with_outputs(head: FlatHeads, out: tuple[tuple[jax.Array, ...], ...]) -> FlatHeads:
    """The heads with other arrays as their `outputs`."""

    def one(part: Part, out: tuple[jax.Array, ...]) -> Part:
        if isinstance(part, Outputs):
            return dataclasses.replace(part, outputs=out)
        return dataclasses.replace(part, hidden=out[0], weight=out[1], bias=out[2] if len(out) > 2 else None)

    return head._replace(parts=tuple(map(one, head.parts, out)))


def cotangent(
    ops: ModuleType, head: FlatHeads, memory: Memory, *, gradient: bool, keep: bool
) -> tuple[jax.Array, jax.Array, tuple[Any, ...], tuple[tuple[jax.Array, ...], ...] | None]:
    """(loss, weight, z̄, its vjp at `outputs` or None) of one micro-batch, z̄ and the vjp for each part.

    The loss of a part whose labels are all ignored is 0. The weight is that of the first part.
    """
    find = lambda part, factor: _cotangent(ops, part, factor, memory, gradient=gradient, keep=keep)
    losses, weights, zbars, out = zip(*map(find, head.parts, head.factors), strict=True)
    return sum(losses[1:], losses[0]), weights[0], zbars, out if gradient else None


def _cotangent(
    ops: ModuleType, part: Part, factor: Any, memory: Memory, *, gradient: bool, keep: bool
) -> tuple[jax.Array, jax.Array, Any, tuple[jax.Array, ...] | None]:
    scaled = lambda x: x if isinstance(factor, float) and factor == 1 else x * jnp.asarray(factor, x.dtype)
    if isinstance(part, Outputs):
        loss, zbar = jax.value_and_grad(part.loss)(part.outputs)
        assert part.weight is not None  # `of_batch` gives it
        weight = jnp.asarray(part.weight, loss.dtype)
        weight = nan_unless(weight >= 0, weight)
        # A mean over no targets is 0/0; its weight is 0.
        loss, zbar = jax.tree.map(lambda x: scaled(jnp.where(weight == 0, 0, x)), (loss, zbar))
        return loss, weight, zbar, zbar
    assert part.token_weights is not None
    assert isinstance(part.count, jax.Array)
    share_N = scaled(part.token_weights / jnp.where(part.count == 0, 1, part.count))
    loss_N, _, zbar, gradients = ops.linear_cross_entropy(
        part.hidden,
        part.weight,
        part.labels,
        share_N,
        bias_V=part.bias,
        loss=part.loss,
        gradient=gradient,
        keep=keep,
        chunk_bytes=memory.chunk_bytes,
        row_axes=memory.row_axes,
    )
    return jnp.sum(loss_N * share_N), part.count, zbar, None if gradients is None else _present(gradients)


def head_vjp(
    ops: ModuleType, head: FlatHeads, zbars: tuple[Any, ...], share: jax.Array, memory: Memory
) -> tuple[tuple[jax.Array, ...], ...]:
    """The vjp at these heads' `outputs` of `share` times the cotangents of heads with the same shapes."""

    def one(part: Part, zbar: Any) -> tuple[jax.Array, ...]:
        if isinstance(part, Outputs):
            return jax.tree.map(lambda z, x: (z * share.astype(z.dtype)).astype(x.dtype), zbar, part.outputs)
        zbar = zbar.reweighted(zbar.weights_N * share.astype(zbar.weights_N.dtype))
        options = {"bias_V": part.bias, "chunk_bytes": memory.chunk_bytes, "row_axes": memory.row_axes}
        return _present(ops.logit_vjp(zbar, part.hidden, part.weight, **options))

    return tuple(map(one, head.parts, zbars))


def cut_at_hidden(
    head: FlatHeads, zbars: tuple[Any, ...], out: tuple[tuple[jax.Array, ...], ...]
) -> tuple[tuple[Any, ...], tuple[tuple[jax.Array, ...], ...]]:
    """(h̄ of each linear part and z̄ of each other, (w̄[, b̄]) of each linear part and () of each other).

    Raises:
        UserError: if there is no linear part.
    """
    linear = [isinstance(x, LinearHead) for x in head.parts]
    if not any(linear):
        raise UserError("cut: 'hidden' needs features to return a LinearHead, got Outputs or Logits")
    cut = tuple(x[0] if is_linear else zbar for is_linear, x, zbar in zip(linear, out, zbars, strict=True))
    return cut, tuple(x[1:] if is_linear else () for is_linear, x in zip(linear, out, strict=True))


def hidden_vjp(head: FlatHeads, cut: tuple[Any, ...], share: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
    """Cotangents of these heads' `outputs` from those of `cut_at_hidden`, times `share`; 0 for the head's weight."""

    def one(part: Part, bar: Any) -> tuple[jax.Array, ...]:
        if isinstance(part, Outputs):
            return jax.tree.map(lambda z, x: (z * share).astype(x.dtype), bar, part.outputs)
        hidden, *rest = _outputs(part)
        return ((bar * share).astype(hidden.dtype), *map(jnp.zeros_like, rest))

    return tuple(map(one, head.parts, cut))


def head_weights(head: FlatHeads) -> tuple[tuple[jax.Array, ...], ...]:
    """(weight[, bias]) of each linear part, () of each other."""
    return tuple(_outputs(x)[1:] if isinstance(x, LinearHead) else () for x in head.parts)


def keeps(head: FlatHeads, micro_batches: int, memory: Memory) -> bool:
    """Whether the cotangents of `micro_batches` micro-batches like this one are kept for a second pass."""
    linear = [x for x in head.parts if isinstance(x, LinearHead)]
    if not linear:
        return False
    logits = sum(len(x.hidden) // shards(memory.row_axes) * len(x.weight) for x in linear)
    return memory.keeps(logits * micro_batches, 1, max(x.hidden.dtype.itemsize for x in linear))


def _present(gradients: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    return tuple(x for x in gradients if x is not None)
