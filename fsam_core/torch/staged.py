"""A model in two stages in PyTorch: a lower stage that no perturbation moves is run once for both passes.

Its output x is the input of the upper stage in either pass. The gradient with respect to x, of both passes together, is
pulled back through the lower stage once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fsam_core.errors import UserError
from fsam_core.heads import of_batch
from fsam_core.methods import Perturbed
from fsam_core.regions import in_torch
from fsam_core.split import with_own_containers
from fsam_core.torch import heads, passes
from fsam_core.torch.cotangents import leaves
from fsam_core.torch.gradient_sum import GradientSum
from fsam_core.torch.gradients import add_correction, base_minus_correction, local_norm, with_gradient
from fsam_core.torch.heads import Flat, Head
from fsam_core.torch.pass_config import unchanged
from fsam_core.torch.pass_result import PassResult, scaled
from fsam_core.torch.perturbation import StepInputs, StepResult, in_scope, perturb
from fsam_core.torch.replay import Replay


@dataclass(frozen=True)
class Staged:
    """A model in two stages, so that what no perturbation moves is run once for both passes.

    With a scope that holds nothing of the lower stage (`scope="top:K"` with a prefix that ends where those blocks
    begin) its activations are shared, and the exact method runs it backwards once.

    Attributes:
        prefix: (model, batch) -> the lower stage's output: a tensor or a tree of tensors, those with a graph float.
        suffix: (model, that output, batch) -> what `features` may return.
    """

    prefix: Callable[[nn.Module, Any], Any]
    suffix: Callable[[nn.Module, Any, Any], Head]

    def __call__(self, model: nn.Module, batch: Any) -> Head:
        return self.suffix(model, self.prefix(model, batch), batch)


class SharedPrefix:
    """(a micro-batch) -> whether a model's prefix depends on no tensor that moves.

    It is found out in the first step, and again when a tensor that moves is frozen or no longer frozen.
    """

    def __init__(
        self, features: Staged, model: nn.Module, method: Perturbed, moving: Mapping[Tensor, str], replay: Replay
    ) -> None:
        """`moving` are the names of the model's parameters that move."""
        self._features, self._model, self._method, self._moving = features, model, method, moving
        self._replay = replay
        self._is_shared = False
        self._trained: list[bool] = []  # of the tensors that move, when it was found out

    def __call__(self, batch: Any) -> bool:
        """
        Raises:
            UserError: for a scope of upper blocks that reaches into the prefix.
        """
        trained = [p.requires_grad for p in self._moving]
        if trained != self._trained:
            with torch.enable_grad(), self._replay.replayed():
                reached = leaves(_pytree.tree_leaves(self._features.prefix(self._model, with_own_containers(batch))))
            inside = sorted(self._moving[p] for p in reached if p in self._moving)
            scope = self._method.scope
            if inside and isinstance(scope, str) and scope.startswith("top:"):
                raise UserError(
                    f"features: the prefix of Staged depends on {', '.join(inside[:3])}, which scope={scope!r} moves; "
                    "let it end where those blocks begin"
                )
            self._is_shared, self._trained = not inside, trained
        return self._is_shared


def is_shared(inputs: StepInputs, part: Sequence[Any], rest: Sequence[Any]) -> bool:
    """Whether the prefix is run once: it is one micro-batch's, and no tensor that moves is below.

    Raises:
        UserError: as `SharedPrefix`.
    """
    method, parallel = inputs.method, inputs.config.parallel
    if (
        inputs.shares_prefix is None
        or method.scope == "all"
        or len(part) > 1
        or method.form == "split"
        or method.combine
    ):
        return False
    if parallel.count > 1 or parallel.sharded:
        return False  # a wrapper's hooks run at one forward pass from end to end
    # A correction that is kept is kept of the prefix too, whose g_B is then needed by itself.
    if method.path == "logit" or inputs.keeps_correction or (method.exact and rest):
        return False
    if method.path == "sam" and method.exact and method.direction.known:
        return False  # it has but one pass
    if method.direction.source == "micro" or (rest and method.fraction == 1):
        return False
    return inputs.shares_prefix(part[0])


def corrected(inputs: StepInputs, batch: Any, rest: Sequence[Any]) -> StepResult:
    """ĝ where S is one micro-batch, `batch`; `rest` is the rest of the batch, or empty."""
    config, method = inputs.config, inputs.method
    features, model, w = config.features, config.model, method.strength
    assert isinstance(features, Staged)
    functional, exact, source = method.path == "functional", method.exact, method.direction.source
    backward = not (exact and method.direction.known)

    sums = GradientSum(config)
    with in_torch("base forward"), unchanged(batch, "prefix", "batch"):
        x = features.prefix(model, with_own_containers(batch))
    # A tensor may have several places in x.
    with_graph = (leaf for leaf in _pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.requires_grad)
    crossing = list(dict.fromkeys(with_graph))
    assert config.replay is not None
    state = config.replay.state()

    def suffix(needs_grad: bool) -> tuple[Flat, list[Tensor]]:
        """(the heads at the present weights, the suffix's inputs)."""
        inputs_of = {id(leaf): leaf.detach().requires_grad_(needs_grad) for leaf in crossing}
        given = _pytree.tree_map(lambda leaf: inputs_of.get(id(leaf), leaf), x)
        with unchanged((x, batch), "suffix", "prefix's output or of the batch"):
            head = features.suffix(model, given, with_own_containers(batch))
        return heads.flat(of_batch(head, batch)), [inputs_of[id(leaf)] for leaf in crossing]

    with torch.set_grad_enabled(backward), in_torch("base forward"):
        head, x_S = suffix(needs_grad=not exact)
    with in_torch("base backward" if backward else "base forward"):
        cut = method.cut if functional else None
        one = passes.head_loss(config, head, None, 1, state, cut=cut, sums=sums if backward else None)
    base_S = PassResult.of_one(one)
    c_S = [] if exact else _gradients_of(x_S)  # with respect to x
    del head, x_S
    g_S = g_B = sums.take()
    base, of_S = base_S, torch.ones_like(base_S.weight)
    if rest:
        g_B, base = passes.with_rest(config, rest, g_S, base_S)
        of_S = base_S.weight / torch.where(base.weight > 0, base.weight, 1)
    scope = in_scope(inputs, list(g_B) if backward else [p for p in config.params if p.requires_grad])
    # Prefix gradients are not computed yet, and the scope holds none of these.
    base_norm = local_norm(config.parallel, scope, g_B) if backward else None
    ascends = {"full": g_B, "part": g_S, "none": None}[source]
    norm = base_norm if method.direction.name == "full" else None
    moved, epsilon = perturb(inputs, scope, ascends, norm=norm)
    if method.fraction == 1:
        g_S = g_B
    onto = {} if exact else base_minus_correction(config.parallel, g_B, g_S, w)
    del g_S, g_B, ascends  # freed before the second pass makes its own

    sums = GradientSum(config, onto if functional else None)
    moved_loss = None
    with config.replay.replayed(), config.weights.at(scope, moved):
        config.replay.restore(state)
        with in_torch("second forward"):
            head, x_moved = suffix(needs_grad=True)
        with in_torch("second backward"):
            if functional:
                (saved,) = scaled(base_S.saved, w)
                passes.head_vjp(config, head, saved.cotangents, sums)
            else:
                moved_loss = passes.head_loss(config, head, None, 1, state, cut=None, sums=sums)[0]
    if not functional:
        sums = GradientSum(config, add_correction(onto, sums.take(), w))
    c = _gradients_of(x_moved)
    for c_moved, c_base in zip(c, c_S, strict=False):  # w c' + (|S| / |B| − w) c_S
        weighted = c_moved if functional else c_moved.mul_(w)
        weighted.add_(c_base * (of_S.to(c_base) - w))
    if crossing:
        with in_torch("second backward"):
            torch.autograd.backward(crossing, c)
            sums.collect()
    g_hat = sums.take()
    with_gradient(g_hat)
    return StepResult(g_hat, base.loss, moved_loss, base.weight, base_norm, epsilon)


def _gradients_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(one) if one.grad is None else one.grad for one in tensors]
