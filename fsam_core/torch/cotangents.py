"""One micro-batch's heads in a pass: their loss, their cotangents, and the gradients of these in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.torch.heads import Flat, FlatHead, FlatOutputs
from fsam_kernels.memory import Memory
from fsam_kernels.torch.direction import accum_dtype

Pairs = list[tuple[Tensor, Tensor]]
"""Tensors of a graph with their gradients, from which autograd continues."""


class AtTensors(NamedTuple):
    """A cotangent at a head's own tensors: that of `Outputs`, or of a linear head cut at its hidden states.

    Attributes:
        own: of this micro-batch's tensors.
        shared: of the head's weight and bias, which all micro-batches have in common.
    """

    own: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()


def divisors(heads: Flat, unit: Tensor) -> list[Tensor]:
    """What each head's sum over its tokens is divided by, where the micro-batch is to weigh count / unit.

    The first head's count is the micro-batch's. Another head's mean is multiplied by it.
    """
    first, *others = heads
    found = [unit if _is_one(first.factor) else unit / first.factor]
    for head in others:
        own = torch.where(head.count != 0, head.count, 1)
        found.append(own * unit / (first.count.to(own.device) * head.factor))
    return found


def cotangent(
    ops: ModuleType,
    head: FlatHead | FlatOutputs,
    divisor: Tensor,
    memory: Memory,
    *,
    gradient: bool,
    saved: int = 0,
    onto: Tensor | None = None,
    upcast: bool = False,
) -> tuple[Tensor, Any, tuple[Tensor, ...] | None]:
    """(loss, z̄, z̄ at the head's tensors or None) of one micro-batch: sums over its tokens, over `divisor`.

    The cotangent of a linear head's weight is added to `onto` where that is given, and is then that.

    Args:
        upcast: whether that cotangent is returned as it was summed, in float32.
        saved: of how many such heads z̄ is saved for a second pass; `memory` says in which form.

    Raises:
        UserError: for a loss of `Outputs` that is no scalar, reaches more than the outputs, or writes to them.
    """
    if isinstance(head, FlatOutputs):
        loss, zbar = _of_outputs(head, divisor)
        return loss, AtTensors(zbar), zbar
    share_N = head.token_weights / divisor
    loss_N, _, found, gradients = ops.linear_cross_entropy(
        head.hidden,
        head.weight,
        head.labels,
        share_N,
        bias_V=head.bias,
        loss=head.loss,
        gradient=gradient,
        keep=saved > 0 and _keeps(head, saved, memory),
        onto_VxD=onto,
        upcast_wbar=upcast,
        vocabulary=head.vocabulary,
        chunk_bytes=memory.chunk_bytes,
    )
    return (loss_N * share_N).sum(), found, None if gradients is None else _present(gradients)


def _of_outputs(head: FlatOutputs, divisor: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        z = [x.detach().requires_grad_() for x in head.tensors]
        try:
            loss = head.loss(z)
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise UserError(
                "Outputs: loss writes to the outputs in place, and they are the model's; have it compute new ones, "
                "z / T say, or write to z.clone()"
            ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"Outputs: loss must return a scalar tensor, got {got}")
    besides = [x for x in leaves([loss]) if not any(x is one for one in z)]
    if besides:
        raise ReachesMore(besides)
    if not loss.requires_grad:
        raise UserError("Outputs: loss does not depend on the outputs it is given; use its argument, not detached")
    # The share holds the loss scale, so it is in the loss before autograd rounds z̄ to half precision.
    share = head.count / divisor
    with torch.enable_grad():
        weighted = loss.reshape(()) * share
    zbar = torch.autograd.grad(weighted, z, allow_unused=True, materialize_grads=True)
    # A mean over no targets is 0/0; it weighs nothing.
    found = [torch.where(share != 0, x.detach(), 0) for x in (weighted, *zbar)]
    return found[0], tuple(found[1:])


class ReachesMore(UserError):
    """A loss of `Outputs` reached these leaves besides its outputs; a pass, which knows their names, names them."""

    def __init__(self, reached: Sequence[Tensor], name: str = "") -> None:
        first = name or f"a tensor of shape {tuple(reached[0].shape)}"
        more = f" and {len(reached) - 1} more" if len(reached) > 1 else ""
        super().__init__(
            f"Outputs: loss reaches {first}{more} besides the outputs it is given; return in `outputs` everything of "
            "the model that the loss uses, or detach() it"
        )
        self.reached = reached


def head_vjp(
    ops: ModuleType,
    head: FlatHead | FlatOutputs,
    zbar: Any,
    memory: Memory,
    onto: Tensor | None = None,
    upcast: bool = False,
) -> tuple[Tensor, ...]:
    """The cotangent of another head of these shapes, contracted with this one: cotangents of its tensors.

    `onto` and `upcast` are as in `cotangent`.
    """
    if isinstance(zbar, AtTensors):
        return (*zbar.own, *zbar.shared)
    assert isinstance(head, FlatHead)
    options = {"bias_V": head.bias, "onto_VxD": onto, "upcast_wbar": upcast, "chunk_bytes": memory.chunk_bytes}
    return _present(ops.logit_vjp(zbar, head.hidden, head.weight, **options))


def weight_in_place(head: FlatHead | FlatOutputs) -> Any:
    """The head's weight where it may get its gradient without autograd; else None.

    That needs a weight which is a parameter itself and has no hooks. The products of every chunk, micro-batch and pass
    then add to one array, and autograd's sums with the embedding's gradient, each as large as the vocabulary, fall
    away.
    """
    if isinstance(head, FlatOutputs):
        return None
    w: Any = head.weight
    allows = w.is_leaf and w.requires_grad and type(w) in (Tensor, nn.Parameter) and not w._backward_hooks
    return w if allows else None


def can_add(head: FlatHead | FlatOutputs, so_far: Tensor | None) -> bool:
    """Whether the products of a linear head can add to this sum: it has the dtype in which they are summed."""
    if so_far is None or so_far.is_sparse or isinstance(head, FlatOutputs):
        return False
    return so_far.dtype == accum_dtype(head.hidden.dtype)


def pairs(
    head: FlatHead | FlatOutputs,
    gradients: Sequence[Tensor],
    *,
    add_weight: Callable[[Tensor, bool], None] | None = None,
    donate: bool = True,
) -> Pairs:
    """The head's tensors with their gradients, for one backward pass from all heads.

    Args:
        add_weight: takes the gradient of the head's weight, and whether its buffer may be reused, in place of autograd.
        donate: whether the gradients' buffers may be reused.
    """
    found: Pairs = []
    for x, g in zip(head.tensors, gradients, strict=False):
        if not x.requires_grad:
            continue
        is_weight = isinstance(head, FlatHead) and x is head.weight
        if is_weight and add_weight is not None:
            add_weight(g, donate)
        else:
            g = g.to(x.dtype)
            # Autograd may make a view of it the gradient itself, of a weight stored as [D, V].
            may_be_kept = is_weight or (x if x._base is None else x._base).is_leaf
            found.append((x, g.clone() if may_be_kept and not donate else g))
    return found


def backward(found: Pairs) -> None:
    """Add their VJP to every parameter's `.grad`."""
    if found:
        torch.autograd.backward([x for x, _ in found], [g for _, g in found])


def rescaled(zbar: Any, factor: Tensor) -> Any:
    """A cotangent times a factor."""
    if isinstance(zbar, AtTensors):
        # The head's are large, and nobody else has them.
        return AtTensors(tuple(x * factor.to(x) for x in zbar.own), tuple(x.mul_(factor.to(x)) for x in zbar.shared))
    return dataclasses.replace(zbar, weights_N=zbar.weights_N * factor.to(zbar.weights_N))


def leaves(tensors: Iterable[Any]) -> list[Tensor]:
    """The tensors that require gradients and that these tensors' graphs reach."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [x.grad_fn for x in tensors if isinstance(x, Tensor) and x.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [one for one, _ in node.next_functions if one is not None]
    return list(found.values())


def _keeps(head: FlatHead, count: int, memory: Memory) -> bool:
    """Whether the cotangents of that many such heads are kept, and not recomputed."""
    V = len(head.weight) if head.vocabulary is None else head.vocabulary.widest
    return memory.keeps(len(head.hidden) * count, V, head.hidden.element_size())


def _is_one(factor: Any) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


def _present(gradients: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in gradients if x is not None)
