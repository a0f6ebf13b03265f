"""Heads in PyTorch: what `features` returns, its loss, and the logit cotangent at the model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.heads import check
from fsam_core.torch.dtensor import local_head
from fsam_kernels.memory import Memory
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
        labels: [...] int64; a negative one is ignored.
        token_weights: [...] weight of each label in the mean, or None for 1.
        bias: [V] added to the logits, cut as the weight is, or None.
        layout: "DV" for a weight stored as [D, V].
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is ignored too (the padding token, say).
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weights: Tensor | None = None
    bias: Tensor | None = None
    layout: Layout = "VD"
    loss: Loss = CROSS_ENTROPY
    ignore_index: int | None = None


@dataclass(frozen=True)
class FlatHead(LinearHead):
    """The result of `flat`: [N, D], [V, D], [N], [N] and [V]; of a DTensor the part of this rank.

    Attributes:
        vocabulary: the ranks that weight and bias are cut over, or None.
    """

    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Logits:
    """The output of a model without a linear head.

    Attributes:
        logits: tensor of any shape, with its graph.
        loss: logits -> mean loss, a scalar; it must not depend on the parameters in another way.
        weight: how much this micro-batch counts beside others (its number of targets, say).
    """

    logits: Tensor
    loss: Callable[[Tensor], Tensor]
    weight: Tensor | float = 1.0


def outputs(head: Any) -> tuple[Tensor, ...]:
    """The tensors of a head through which gradients flow to the parameters, the model's own output first.

    Raises:
        UserError: for what is no head.
    """
    if isinstance(head, Logits):
        return (head.logits,)
    if not isinstance(head, LinearHead):
        raise UserError(f"features must return a LinearHead or Logits, got {type(head).__name__}")
    return (head.hidden, head.weight) if head.bias is None else (head.hidden, head.weight, head.bias)


def with_outputs(head: Any, given: Sequence[Tensor]) -> Any:
    """The head with these tensors in place of the first of its `outputs`."""
    names = ("logits",) if isinstance(head, Logits) else ("hidden", "weight", "bias")
    return dataclasses.replace(head, **dict(zip(names, given, strict=False)))


def flat(head: Any) -> FlatHead | Logits:
    """The head checked, with its leading axes made one, its weight as [V, D], and weights where there were none.

    Raises:
        UserError: for shapes that do not fit, or DTensors placed as they cannot be used.
    """
    if isinstance(head, Logits):
        return head
    outputs(head)
    check(head)
    vocabulary = None
    if any(hasattr(x, "to_local") for x in (head.hidden, head.weight, head.labels, head.token_weights, head.bias)):
        found, vocabulary = local_head(head)
        head = dataclasses.replace(head, **found)
    y, weights = head.labels.reshape(-1), head.token_weights
    if head.ignore_index is not None:
        y = y.masked_fill(y == head.ignore_index, -1)
    kind = torch.promote_types(head.hidden.dtype, torch.float32)
    weights = torch.ones(y.shape, dtype=kind, device=y.device) if weights is None else weights.reshape(-1).to(kind)
    return FlatHead(
        # Under the user's autocast the head computes in its dtype, as a linear layer would.
        hidden=head.hidden.reshape(-1, head.hidden.shape[-1]).to(compute_dtype(head.hidden)),
        weight=head.weight if head.layout == "VD" else head.weight.T,
        labels=y,
        token_weights=torch.where(y >= 0, weights, 0),
        bias=head.bias,
        loss=head.loss,
        vocabulary=vocabulary,
    )


def weight(head: FlatHead | Logits) -> Tensor:
    """How much a micro-batch counts."""
    if isinstance(head, Logits):
        dtype = torch.promote_types(head.logits.dtype, torch.float32)
        return torch.as_tensor(head.weight, dtype=dtype, device=head.logits.device)
    assert head.token_weights is not None
    return head.token_weights.sum()


def cotangent(
    ops: ModuleType,
    head: FlatHead | Logits,
    unit: Tensor,
    memory: Memory,
    *,
    gradient: bool,
    saved: int = 0,
    onto: Tensor | None = None,
) -> tuple[Tensor, Any, tuple[Tensor, ...] | None]:
    """(loss, z̄, z̄ at the outputs of the model or None) of one micro-batch: sums over its tokens, divided by `unit`.

    The cotangent of a linear head's weight is added to `onto` where that is given, and is then that.

    Args:
        saved: of how many such micro-batches z̄ is saved for a second pass; `memory` says in which form.
    """
    if isinstance(head, Logits):
        with torch.enable_grad():
            z = head.logits.detach().requires_grad_()
            loss = head.loss(z)
        (zbar,) = torch.autograd.grad(loss, z)
        share = weight(head) / unit
        # A mean over no targets is 0/0; it weighs nothing.
        loss, zbar = (torch.where(share > 0, x.detach() * share.to(x), 0) for x in (loss, zbar))
        return loss, zbar, (zbar,)
    assert head.token_weights is not None
    share_N = head.token_weights / unit
    loss_N, _, zbar, gradients = ops.linear_cross_entropy(
        head.hidden,
        head.weight,
        head.labels,
        share_N,
        bias_V=head.bias,
        loss=head.loss,
        gradient=gradient,
        keep=saved > 0 and _keeps(head, saved, memory),
        onto_VxD=onto,
        vocabulary=head.vocabulary,
        chunk_bytes=memory.chunk_bytes,
    )
    return (loss_N * share_N).sum(), zbar, None if gradients is None else _present(gradients)


def head_vjp(
    ops: ModuleType, head: FlatHead | Logits, zbar: Any, memory: Memory, onto: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The logit cotangent of another head of these shapes, contracted with this one: cotangents of its `outputs`.

    `onto` is as in `cotangent`. A tuple holds such cotangents already: of the hidden states and, in one micro-batch, of
    the head's weight and bias.
    """
    if isinstance(head, Logits):
        return (zbar,)
    if isinstance(zbar, tuple):
        return zbar
    options = {"bias_V": head.bias, "onto_VxD": onto, "chunk_bytes": memory.chunk_bytes}
    return _present(ops.logit_vjp(zbar, head.hidden, head.weight, **options))


def _keeps(head: FlatHead, micro_batches: int, memory: Memory) -> bool:
    """Whether the cotangents of that many such micro-batches are kept, and not recomputed."""
    V = len(head.weight) if head.vocabulary is None else head.vocabulary.widest
    return memory.keeps(len(head.hidden) * micro_batches, V, head.hidden.element_size())


def in_place_sum(head: FlatHead | Logits) -> tuple[bool, Tensor | None]:
    """(whether the head's weight may get its gradient without autograd, the gradient it has if products can add to it).

    That needs a weight which is a parameter itself and has no hooks. The products of every chunk, micro-batch and pass
    then add to one array, and autograd's sums with the embedding's gradient, each as large as the vocabulary, fall
    away.
    """
    if isinstance(head, Logits):
        return False, None
    w: Any = head.weight
    hooks = (w._backward_hooks, getattr(w, "_post_accumulate_grad_hooks", None))
    if not w.is_leaf or not w.requires_grad or type(w) not in (Tensor, nn.Parameter) or any(hooks):
        return False, None
    accum = torch.promote_types(head.hidden.dtype, torch.float32)
    can_add = w.grad is not None and not w.grad.is_sparse and w.grad.dtype == accum
    return True, w.grad if can_add else None


def backward(
    head: FlatHead | Logits, gradients: Sequence[Tensor], *, in_place: bool = False, donate: bool = True
) -> None:
    """Add the VJP of the cotangents of the head's `outputs` to every parameter's `.grad`.

    Args:
        in_place: the head's weight, which allows for it, gets its cotangent first and without autograd.
        donate: whether that cotangent's buffer may be reused.
    """
    pairs = [(x, g) for x, g in zip(outputs(head), gradients, strict=False) if x.requires_grad]
    if in_place and isinstance(head, FlatHead):
        for wbar_VxD in (g for x, g in pairs if x is head.weight):
            _accumulate(head.weight, wbar_VxD, donate)
        pairs = [(x, g) for x, g in pairs if x is not head.weight]
    if pairs:
        # Autograd may make a view of it the gradient itself, of a weight stored as [D, V].
        given = [g.clone() if x is getattr(head, "weight", None) and not donate else g for x, g in pairs]
        torch.autograd.backward([x for x, _ in pairs], given)


def _accumulate(p: Tensor, gradient: Tensor, donate: bool) -> None:
    if p.grad is None:
        p.grad = gradient if donate else gradient.clone()
    elif p.grad is not gradient:
        p.grad.add_(gradient)


def _present(gradients: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in gradients if x is not None)
