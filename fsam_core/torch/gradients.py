"""Gradients as dictionaries by tensor, and the sums of them that a correction consists of, in place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Combine
from fsam_core.regions import in_torch
from fsam_core.torch.dtensor import likes
from fsam_core.torch.parallel import Parallel

Gradients = dict[Any, Tensor]
"""Tensor of the optimizer -> its gradient, in the optimizer's order; this rank's part of a sharded one."""


def base_minus_correction(parallel: Parallel, g_B: Gradients, g_S: Gradients, w: float) -> Gradients:
    """g_B − w g_S, in the arrays of g_B where those are not g_S's too."""
    of = {p: g.clone() if g_S.get(p) is g else g for p, g in clone_if_reused(parallel, g_B).items()}
    both = [p for p in of if p in g_S]
    if both:
        torch._foreach_sub_([of[p] for p in both], [g_S[p] for p in both], alpha=w)
    return of


def add_correction(onto: Gradients, g_moved: Gradients, w: float) -> Gradients:
    """onto + w g', in the arrays of `onto`, or in those of g' where that has nothing."""
    both = [p for p in onto if p in g_moved]
    if both:
        torch._foreach_add_([onto[p] for p in both], [g_moved[p] for p in both], alpha=w)
    alone = {p: g for p, g in g_moved.items() if p not in onto}
    if alone and w != 1:
        torch._foreach_mul_(list(alone.values()), w)
    return onto | alone


def divide(gradients: Collection[Tensor], divisor: Tensor) -> None:
    """Gradients over a number, in place; it is rounded to the dtype of each."""
    for some in _by_dtype(gradients):
        torch._foreach_div_(some, divisor.to(some[0]))


def scale(gradients: Collection[Tensor], factor: Tensor | float) -> None:
    """Gradients times a factor, in place; a tensor is rounded to the dtype of each."""
    for some in _by_dtype(gradients):
        torch._foreach_mul_(some, factor.to(some[0]) if isinstance(factor, Tensor) else factor)


def _by_dtype(gradients: Collection[Tensor]) -> Collection[list[Tensor]]:
    kinds: dict[Any, list[Tensor]] = {}
    for g in gradients:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    return kinds.values()


def difference(g_hat: Gradients, g_B: Gradients) -> Gradients:
    """ĝ − g_B, in the arrays of g_B; a tensor may be in one of them alone, as an expert that a pass did not use."""
    found = {p: torch.sub(g_hat[p], g, out=g) if p in g_hat else g.neg_() for p, g in g_B.items()}
    return found | {p: g.clone() for p, g in g_hat.items() if p not in g_B}


def combine(parallel: Parallel, g: Gradients, g_moved: Gradients, how: Combine) -> None:
    """α g + β g', in the arrays of g', which gets those it lacks; α and β are of the products over whole tensors."""
    every = [*g_moved, *(p for p in g if p not in g_moved)]

    def products(x: Gradients, y: Gradients) -> Tensor:
        upcast = lambda z: z.reshape(-1).to(torch.promote_types(z.dtype, torch.float32))
        return torch.stack([torch.dot(upcast(x[p]), upcast(y[p])) if p in x and p in y else zero for p in every])

    first = next(iter((g_moved or g).values()))
    zero = first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))
    sums = [products(g, g), products(g, g_moved), products(g_moved, g_moved)]
    alpha, beta = how(*(x.sum() for x in parallel.all_reduce_sums(every, sums, False)))
    for p, gradient in g_moved.items():
        gradient.mul_(beta)
        if p in g:
            gradient.add_(g[p] * alpha)
    g_moved |= {p: g[p] * alpha for p in every if p not in g_moved}


def add_weighted(total: Gradients, gradients: Gradients, weight: Tensor) -> None:
    """Add gradients times a weight, in their own arrays."""
    scale(gradients.values(), weight)
    both = [p for p in gradients if p in total]
    if both:
        torch._foreach_add_([gradients[p] for p in both], [total[p] for p in both])
    total |= gradients


def clone_if_reused(parallel: Parallel, gradients: Gradients) -> Gradients:
    """The same, such that the next pass does not write over them."""
    if not parallel.reuses_gradients:
        return gradients
    return {p: x.clone() for p, x in gradients.items()}


def local_norm(parallel: Parallel, params: Sequence[Any], gradients: Gradients) -> Tensor:
    """`Parallel.local_norm` of the gradients of those tensors that have one."""
    having = [p for p in params if p in gradients]
    with in_torch("norm"):
        return parallel.local_norm(having, [gradients[p] for p in having])


def with_gradient(gradients: Gradients) -> list[Any]:
    """The tensors that got a gradient.

    Raises:
        UserError: where there are none.
    """
    if not gradients:
        raise UserError("optimizer: none of its parameters got a gradient; is the model frozen, or not its own?")
    return list(gradients)


def write(gradients: Gradients, sparse: Collection[Any] = ()) -> None:
    """These as the `.grad` of their tensors: of a `sparse` embedding the rows that are not 0."""
    for p, gradient in zip(gradients, likes(gradients, gradients.values()), strict=True):
        p.grad = gradient.to_sparse(1) if p in sparse else gradient
