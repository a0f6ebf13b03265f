"""The gradients of a pass in PyTorch while it runs: in `.grad`, or over masters in the masters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.torch import cotangents
from fsam_core.torch.dtensor import local_parts
from fsam_core.torch.gradients import Gradients, add_correction, scale, write
from fsam_core.torch.heads import FlatHead, FlatOutputs
from fsam_core.torch.pass_config import PassConfig


class WeightSum(NamedTuple):
    """Where the gradient of a head's weight goes.

    Attributes:
        add: takes it, and whether its buffer may be reused, in place of autograd; None where autograd is to have it.
        onto: a sum to which products can add it; then it is added already when `add` gets it.
        upcast: whether it is wanted in float32, as it was summed.
    """

    add: Callable[[Tensor, bool], None] | None = None
    onto: Tensor | None = None
    upcast: bool = False


class GradientSum:
    """The gradients of a pass while it runs: those it starts from, plus what autograd adds.

    Gradients of masters are summed in the masters' dtype, so they are taken from the model's parameters after each
    micro-batch.
    """

    def __init__(self, config: PassConfig, onto: Gradients | None = None) -> None:
        """`onto` is added to in place."""
        clear_gradients(config)
        self._config = config
        # What autograd adds is scaled, or goes to masters: then the sum is not in `.grad`.
        self._apart = dict(onto or {}) if config.weights.copies or config.is_scaled else {}
        if onto and not self._apart:
            write(onto)

    def of_weight(self, head: FlatHead | FlatOutputs) -> WeightSum:
        """Where the gradient of the head's weight goes.

        Over masters that is the master's sum: w̄ stays in float32 as it was summed, and is not rounded to the weight's
        dtype on its way.
        """
        weight = None if self._config.parallel.hooked else cotangents.weight_in_place(head)
        if weight is None:
            return WeightSum()
        master = None if self._config.is_scaled else self._config.weights.masters.get(weight)
        so_far = weight.grad if master is None else self._apart.get(master)
        onto = so_far if cotangents.can_add(head, so_far) else None
        return WeightSum(partial(self._add, weight, master), onto, master is not None)

    def _add(self, weight: Any, master: Any, gradient: Tensor, donate: bool) -> None:
        so_far = weight.grad if master is None else self._apart.get(master)
        if so_far is not None:
            if so_far is not gradient:  # else the products have added to it
                so_far.add_(gradient)
            return
        found = gradient.to((weight if master is None else master).dtype)
        found = gradient.clone() if found is gradient and not donate else found
        if master is None:
            weight.grad = found
        else:
            self._apart[master] = found

    def collect(self) -> None:
        """After a micro-batch, add the gradients of the model's parameters to their masters'."""
        found = {m: p.grad for m, p in self._config.weights.copies.items() if p.grad is not None}
        for p in self._config.weights.copies.values():
            p.grad = None
        sparse = {m: g for m, g in found.items() if g.is_sparse}
        dense = {m: g for m, g in found.items() if m not in sparse}
        if dense:
            upcast = [torch.empty_like(g, dtype=m.dtype) for m, g in dense.items()]
            torch._foreach_copy_(upcast, list(dense.values()))
            if self._config.is_scaled:
                torch._foreach_mul_(upcast, 1 / self._config.loss_scale)
            self._apart = add_correction(self._apart, dict(zip(dense, upcast, strict=True)), 1.0)
        for master, g in sparse.items():  # a lookup's rows, after the head's sum or alone
            rows = g.to(master.dtype) * (1 / self._config.loss_scale) if self._config.is_scaled else g.to(master.dtype)
            so_far = self._apart.get(master)
            self._apart[master] = rows.to_dense() if so_far is None else so_far.add_(rows)

    def take(self) -> Gradients:
        """All of them, out of `.grad`."""
        params = self._config.params
        if self._config.weights.copies:
            return {p: self._apart[p] for p in params if p in self._apart}
        having = [p for p in params if p.grad is not None]
        # A sparse embedding's gradient is dense within the step.
        given = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in having]
        found = dict(zip(having, local_parts(given), strict=True))
        for p in having:
            p.grad = None
        if not self._config.is_scaled:
            return found
        scale(found.values(), 1 / self._config.loss_scale)
        found = add_correction(self._apart, found, 1.0)
        return {p: found[p] for p in params if p in found}


def clear_gradients(config: PassConfig) -> None:
    """No `.grad` in the model or the optimizers."""
    for p in (*config.model.parameters(), *config.params):
        p.grad = None
