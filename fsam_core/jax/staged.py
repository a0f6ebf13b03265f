"""Two-stage models in JAX: an unperturbed lower stage has one forward and one backward pass for both passes.

The passes run an upper model of which the lower stage's output x is a parameter like the others. The gradients of x
from both passes are combined, and the vjp of the lower stage is applied to them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval

from fsam_core import regions
from fsam_core.errors import UserError
from fsam_core.jax import passes, trees
from fsam_core.jax.passes import Params, add_correction, upcast, weighted_mean
from fsam_core.jax.perturbation import StepInputs, StepResult, norm_of, perturb
from fsam_core.split import with_own_containers


@dataclass(frozen=True)
class Staged:
    """A model in two stages, so that an unperturbed lower stage runs once for both passes.

    If the scope contains no parameter of the lower stage (`scope="top:K"` with a prefix that ends where those blocks
    begin), both passes share its activations, and it has one backward pass.

    Attributes:
        prefix: (params, batch) -> the lower stage's output: an array or a tree of arrays, all floating.
        suffix: (params, that output, batch) -> a head, as `features` returns it.
    """

    prefix: Callable[[Params, Any], Any]
    suffix: Callable[[Params, Any, Any], Any]

    def __call__(self, params: Params, batch: Any) -> Any:
        return self.suffix(params, self.prefix(params, batch), batch)


class _Stages(NamedTuple):
    """The arguments of the suffix that are differentiated."""

    params: Params
    prefix: Any


def is_shared(inputs: StepInputs, S: list[Any], others: list[Any]) -> bool:
    """Whether the lower stage runs once: S is one micro-batch, and no leaf below is perturbed.

    Raises:
        UserError: for a scope of upper blocks that includes a parameter of the lower stage.
    """
    features, method = inputs.config.features, inputs.method
    if (
        not isinstance(features, Staged)
        or method.form == "split"
        or method.combine
        or inputs.mask is None
        or len(S) > 1
        or inputs.pass_axis is not None
    ):
        return False
    if method.path == "logit" or inputs.reuses or (others and method.fraction == 1):
        return False
    if method.path == "sam" and method.exact and method.direction.known:
        return False  # it has only one pass
    inside = sorted(moving(inputs, S[0]))
    if inside and isinstance(method.scope, str) and method.scope.startswith("top:"):
        raise UserError(
            f"features: the prefix of Staged depends on {', '.join(inside[:3])}, which scope={method.scope!r} moves; "
            "let it end where those blocks begin"
        )
    return not inside


def moving(inputs: StepInputs, batch: Any) -> set[str]:
    """The names of the perturbed leaves on which the lower stage's output depends."""
    features = inputs.config.features
    assert isinstance(features, Staged)
    traced = jax.make_jaxpr(lambda params: features.prefix(params, with_own_containers(batch)))(inputs.params)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    leaves = zip(trees.names(inputs.params), jax.tree.leaves(inputs.mask), used, strict=True)
    return {name for name, moves, reached in leaves if moves and reached}


def corrected(inputs: StepInputs, S: Any, others: list[Any]) -> StepResult:
    """ĝ if the correction is computed on one micro-batch, S; `others` are the rest of the batch, or none."""
    config, method, params = inputs.config, inputs.method, inputs.params
    features = config.features
    assert isinstance(features, Staged)
    with regions.in_jax("base forward"):
        x, vjp_of_prefix = jax.vjp(lambda p: features.prefix(p, with_own_containers(S)), params)
    upper = config._replace(features=lambda both, batch: features.suffix(both.params, both.prefix, batch))
    functional, exact = method.path == "functional", method.exact
    backward = not (exact and method.direction.known)
    seen = passes.loss_and_grad(upper, _Stages(params, x), [S], backward=backward, keep=functional, cut=method.cut)
    g_S, c_S = seen.g if backward else (None, None)
    evaluated, bad, aux = [(seen.weight, (seen.loss, g_S))], [seen.bad_label], seen.aux
    if others:
        rest = passes.loss_and_grad(config, params, passes.stacked(others))
        evaluated.append((rest.weight, (rest.loss, rest.g)))
        bad.append(rest.bad_label)
        aux = aux + rest.aux
    weight, (loss, g_B) = weighted_mean(evaluated)
    # The gradients of the lower stage are not computed yet; the mask excludes them.
    base_norm = None
    if backward:
        with regions.in_jax("norm"):
            base_norm = norm_of(g_B, inputs.mask)
    moved, epsilon = perturb(inputs, {"part": g_S, "none": None}.get(method.direction.source, g_B))
    moved_loss = None
    if functional:
        g_moved, c = passes.vjp(upper, _Stages(moved, x), [S], seen.cotangents)
    else:
        there = passes.loss_and_grad(upper, _Stages(moved, x), [S], region="second")
        moved_loss, (g_moved, c) = there.loss, there.g
    if not exact:
        share = seen.weight / jax.numpy.where(weight > 0, weight, 1)
        g_moved = add_correction(g_B, g_moved, g_S, method.strength)
        leaf = lambda there, here: (method.strength * upcast(there) + (share - method.strength) * upcast(here)).astype(
            here.dtype
        )
        with regions.in_jax("update"):
            c = jax.tree.map(leaf, c, c_S)
    with regions.in_jax("second backward"):
        (below,) = vjp_of_prefix(c)
        g_hat: Params = jax.tree.map(lambda upper, lower: upper + lower, g_moved, below)
    return StepResult(loss, moved_loss, weight, base_norm, epsilon, g_hat, None, passes.largest(bad), aux)
