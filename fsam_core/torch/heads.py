"""Heads in PyTorch: what `features` returns, and each head checked and flattened for the passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from fsam_core.errors import UserError
from fsam_core.heads import check_heads, check_shapes
from fsam_core.torch.dtensor import local_head
from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss
from fsam_kernels.torch.linear_cross_entropy import compute_dtype
from fsam_kernels.torch.vocabulary import Vocabulary


@dataclass(frozen=True)
class LinearHead:
    """A model's output as hidden states and head weight; the loss is the weighted mean cross entropy of their product.

    Attributes:
        hidden: [..., D] last hidden states, with their graph.
        weight: [V, D] the head's weight (tied to the embedding or not), whole or a DTensor cut along V over the ranks
            of a one-axis mesh. All else is then the same on each of them.
        labels: [...] integers below V; a negative one is ignored.
        token_weights: [...] weight of each label in the mean, or None for 1.
        bias: [V] added to the logits, cut as the weight is, or None.
        layout: "DV" for a weight stored as [D, V].
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is ignored too (the padding token, say).
        count: what the weighted sum of the losses is divided by, and how much this batch counts beside others; None for
            the sum of its token weights. Weights that may sum to 0 or below (advantages, say) need it. It must be that
            of the batch which `features` was given, since S and the rest are batches of their own.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weights: Tensor | None = None
    bias: Tensor | None = None
    layout: Layout = "VD"
    loss: Loss = CROSS_ENTROPY
    ignore_index: int | None = None
    count: Tensor | float | None = None


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model and a loss of them alone.

    Attributes:
        outputs: any tree of tensors; those of a floating dtype are the outputs, with their graph.
        loss: outputs -> mean loss, a scalar. Whatever else of the model it reaches is an error: the method holds the
            loss's derivative with respect to the outputs, and nothing besides.
        weight: how much this micro-batch, or S, counts beside others; None for the rows of the batch that `features`
            was given. A mean over some of its targets needs their number.
    """

    outputs: Any
    loss: Callable[[Any], Tensor]
    weight: Tensor | float | None = None


@dataclass(frozen=True)
class Logits:
    """`Outputs` of one tensor.

    Attributes:
        logits: tensor of any shape, with its graph.
        loss, weight: as in `Outputs`.
    """

    logits: Tensor
    loss: Callable[[Tensor], Tensor]
    weight: Tensor | float | None = None


@dataclass(frozen=True)
class Heads:
    """Several heads of one model, whose losses are added: several prediction heads, or an auxiliary loss.

    The method treats each alike, which is this project's choice: it holds the derivative of each head's loss with
    respect to the head's outputs at θ, and pulls it back at θ+ε. A loss of the weights alone belongs into the
    optimizer.

    Attributes:
        heads: `LinearHead`, `Outputs` or `Logits`.
        weights: the factor of each head's loss in the sum, or None for 1. Several micro-batches (and S beside the rest)
            are weighted by the first head's count. That is each head's own mean where their counts are proportional.
    """

    heads: Sequence[LinearHead | Outputs | Logits]
    weights: Sequence[float | Tensor] | None = None


Head = LinearHead | Outputs | Logits | Heads


@dataclass(frozen=True)
class FlatHead:
    """A `LinearHead` as [N, D], [V, D], [N], [N] and [V]; of a DTensor the part of this rank.

    Attributes:
        token_weights: 0 for ignored tokens.
        count: what the sum over tokens is divided by.
        factor: of this head's loss in the sum over heads.
        vocabulary: the ranks that weight and bias are cut over, or None.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weights: Tensor
    bias: Tensor | None
    loss: Loss
    count: Tensor
    factor: float | Tensor = 1.0
    vocabulary: Vocabulary | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those through which gradients flow, the model's own output first."""
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)


@dataclass(frozen=True)
class FlatOutputs:
    """`Outputs` as a list of tensors, and the loss of such a list."""

    tensors: tuple[Tensor, ...]
    loss: Callable[[Sequence[Tensor]], Tensor]
    count: Tensor
    factor: float | Tensor = 1.0


Flat = Sequence[FlatHead | FlatOutputs]
"""The heads of one micro-batch."""


def outputs(head: Any) -> tuple[Tensor, ...]:
    """The tensors of what `features` returned through which gradients flow.

    Raises:
        UserError: for what is no head.
    """
    weights = [x for one in linear_heads(head) for x in (one.weight, one.bias) if x is not None]
    return (*activations(head), *weights)


def with_outputs(head: Any, given: Sequence[Tensor]) -> Any:
    """The head with these tensors in place of its `outputs`."""
    count = len(activations(head))
    weights = iter(given[count:])
    replaced = lambda one: (
        dataclasses.replace(one, weight=next(weights), bias=None if one.bias is None else next(weights))
        if isinstance(one, LinearHead)
        else one
    )
    head = with_activations(head, given[:count])
    if isinstance(head, Heads):
        return dataclasses.replace(head, heads=[replaced(one) for one in head.heads])
    return replaced(head)


def activations(head: Any) -> tuple[Tensor, ...]:
    """The tensors that the model computed from the batch: `outputs` without the weights of linear heads."""
    if isinstance(head, Heads):
        return tuple(x for one in head.heads for x in activations(one))
    if isinstance(head, LinearHead):
        return (head.hidden,)
    if isinstance(head, Logits):
        return (head.logits,)
    if not isinstance(head, Outputs):
        raise UserError(f"features must return a LinearHead, Outputs, Logits or Heads, got {type(head).__name__}")
    return tuple(x for x in _pytree.tree_leaves(head.outputs) if _is_float(x))


def with_activations(head: Any, given: Sequence[Tensor]) -> Any:
    """The head with these tensors in place of its `activations`."""
    left = iter(given)
    if isinstance(head, Heads):
        return dataclasses.replace(
            head, heads=[with_activations(one, [next(left) for _ in activations(one)]) for one in head.heads]
        )
    if isinstance(head, Outputs):
        return dataclasses.replace(
            head, outputs=_pytree.tree_map(lambda x: next(left) if _is_float(x) else x, head.outputs)
        )
    return dataclasses.replace(head, **{"logits" if isinstance(head, Logits) else "hidden": next(left)})


def linear_heads(head: Any) -> list[LinearHead]:
    """The linear heads of what `features` returned."""
    return [x for x in (head.heads if isinstance(head, Heads) else [head]) if isinstance(x, LinearHead)]


Check = Literal["now", "later", "not"]
"""How labels and weights are checked by their values: at once, which waits for the device; later, where values that
cannot be right make the loss NaN, so that the step is skipped; or not, in a pass that uses neither."""


def flat(head: Any, check: Check | None = None) -> Flat:
    """Each head checked and flattened. `check` is of labels and weights; None for "now" on a CPU and "later" elsewhere.

    Raises:
        UserError: for shapes that do not fit, DTensors placed as they cannot be used, weights or counts that depend on
            the model, labels ≥ V, and token weights that have no mean.
    """
    if not isinstance(head, Heads):
        return [_flat(head, check)]
    factors = check_heads(head)
    for factor in factors:
        _check_constant(factor, "Heads: weights")
    return [dataclasses.replace(_flat(one, check), factor=x) for one, x in zip(head.heads, factors, strict=True)]


def _flat(head: Any, check: Check | None) -> FlatHead | FlatOutputs:
    if isinstance(head, LinearHead):
        return _flat_linear(head, check)
    tensors = activations(head)
    name = type(head).__name__
    if not tensors:
        raise UserError(f"{name}: outputs has no floating tensor, so there is nothing to differentiate")
    assert head.weight is not None  # `of_batch` gives it
    _check_constant(head.weight, f"{name}: weight")
    if isinstance(head, Logits):
        return FlatOutputs(tensors, lambda given: head.loss(given[0]), _count(head.weight, tensors[0]))
    loss = lambda given: head.loss(with_activations(head, given).outputs)
    return FlatOutputs(tensors, loss, _count(head.weight, tensors[0]))


def _flat_linear(head: LinearHead, check: Check | None) -> FlatHead:
    check_shapes(head)
    vocabulary = None
    if any(hasattr(x, "to_local") for x in (head.hidden, head.weight, head.labels, head.token_weights, head.bias)):
        found, vocabulary = local_head(head)
        head = dataclasses.replace(head, **found)
    y_N, weights = head.labels.reshape(-1), head.token_weights
    if y_N.is_floating_point() or y_N.is_complex() or y_N.dtype == torch.bool:
        raise UserError(f"LinearHead: labels must be integers, got {y_N.dtype}")
    _check_constant(weights, "LinearHead: token_weights")
    _check_constant(head.count, "LinearHead: count")
    y_N = y_N.long()
    if head.ignore_index is not None:
        y_N = y_N.masked_fill(y_N == head.ignore_index, -1)
    kind = torch.promote_types(head.hidden.dtype, torch.float32)
    w_VxD = head.weight if head.layout == "VD" else head.weight.T
    how = check or ("now" if y_N.device.type == "cpu" else "later")
    if how == "not":  # the pass uses neither weights nor their sum
        weights_N = count = torch.zeros(0, dtype=kind)
    else:
        weights_N = (y_N >= 0).to(kind)
        if weights is not None:
            weights_N = torch.where(y_N >= 0, weights.reshape(-1).to(kind), 0)
        count = weights_N.sum() if head.count is None else _count(head.count, weights_N)
        may_have_no_mean = weights is not None or head.count is not None
        V = len(w_VxD) if vocabulary is None else vocabulary.size
        y_N, weights_N = _checked(y_N, weights_N, count if may_have_no_mean else None, V, how)
    return FlatHead(
        # Under the user's autocast the head computes in its dtype, as a linear layer would.
        hidden=head.hidden.reshape(-1, head.hidden.shape[-1]).to(compute_dtype(head.hidden)),
        weight=w_VxD,
        labels=y_N,
        token_weights=weights_N,
        bias=head.bias,
        loss=head.loss,
        count=count,
        vocabulary=vocabulary,
    )


def _checked(y_N: Tensor, weights_N: Tensor, count: Tensor | None, V: int, how: Check) -> tuple[Tensor, Tensor]:
    """(labels, token weights), those that cannot be right refused or made NaN; `count` where it is to be checked."""
    too_large_N = y_N >= V
    has_no_mean = None if count is None else (count <= 0) & (weights_N != 0).any()
    if how == "later":
        wrong = too_large_N.any() if has_no_mean is None else too_large_N.any() | has_no_mean
        return y_N.masked_fill(too_large_N, -1), weights_N.masked_fill(wrong, torch.nan)
    if too_large_N.any():
        raise UserError(f"LinearHead: labels must be below V = {V}, or negative to be ignored; got {y_N.max()}")
    if has_no_mean is not None and count is not None and has_no_mean:
        raise UserError(
            f"LinearHead: a mean over token weights needs a count > 0, got {count:.6g}; give LinearHead(count=...) "
            "the number that their sum is to be divided by"
        )
    return y_N, weights_N


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _check_constant(x: Any, name: str) -> None:
    if isinstance(x, Tensor) and x.requires_grad:
        raise UserError(f"{name} depend(s) on the model's parameters, and no gradient is taken through it; detach() it")


def _count(count: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
