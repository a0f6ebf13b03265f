"""Two-stage models in JAX: an unperturbed lower stage has one forward and one backward pass for both passes.

The passes run an upper model of which the lower stage's output x is a parameter like the others. The gradients of x
from both passes are combined, and the vjp of the lower stage is applied to them once.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import partial_eval

from fsam_core import regions
from fsam_core.errors import UserError
from fsam_core.jax import passes
from fsam_core.jax.passes import Params, Staged, merged, wide
from fsam_core.jax.perturbation import norm_of
from fsam_core.jax.step_types import Outcome, Step, combined, moved_weights


def is_shared(step: Step, S: list[Any], others: list[Any]) -> bool:
    """Whether the lower stage runs once: S is one micro-batch, and no leaf below is perturbed.

    Raises:
        UserError: for a scope of upper blocks that includes a parameter of the lower stage.
    """
    features, method = step.run.features, step.method
    if not isinstance(features, Staged) or step.mask is None or len(S) > 1 or step.pass_axis is not None:
        return False
    if method.path == "logit" or step.reuses or (others and method.fraction == 1):
        return False
    if method.path == "sam" and method.exact and method.direction.known:
        return False  # it has only one pass
    inside = sorted(moving(step, S[0]))
    if inside and isinstance(method.scope, str) and method.scope.startswith("top:"):
        raise UserError(
            f"features: the prefix of Staged depends on {', '.join(inside[:3])}, which scope={method.scope!r} moves; "
            "let it end where those blocks begin"
        )
    return not inside


def moving(step: Step, batch: Any) -> set[str]:
    """The names of the perturbed leaves on which the lower stage's output depends."""
    traced = jax.make_jaxpr(step.run.features.prefix)(step.params, batch)  # type: ignore[attr-defined]
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    leaves = jax.tree_util.tree_leaves_with_path(step.mask)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), moves) for path, moves in leaves]
    return {name for (name, moves), reached in zip(named, used, strict=False) if moves and reached}


def corrected(step: Step, S: Any, others: list[Any]) -> Outcome:
    """ĝ if the correction is computed on one micro-batch, S; `others` are the rest of the batch, or none."""
    run, method, params = step.run, step.method, step.params
    features = run.features
    assert isinstance(features, Staged)
    with regions.in_jax("base forward"):
        x, pull_back_prefix = jax.vjp(lambda p: features.prefix(p, S), params)
    upper = run._replace(features=lambda both, batch: features.suffix(both[0], both[1], batch))
    functional, exact = method.path == "functional", method.exact
    backward = not (exact and method.direction.known)
    seen = passes.base(upper, (params, x), [S], backward=backward, keep=functional, cut=method.cut)
    g_S, c_S = seen.g if backward else (None, None)
    evaluated = [(seen.weight, (seen.loss, g_S))]
    if others:
        rest = passes.base(run, params, passes.stacked(others))
        evaluated.append((rest.weight, (rest.loss, rest.g)))
    weight, (loss, g_B) = merged(evaluated)
    # The gradients of the lower stage are not computed yet; the mask excludes them.
    base_norm = None
    if backward:
        with regions.in_jax("norm"):
            base_norm = norm_of(g_B, step.mask)
    moved, length = moved_weights(step, {"part": g_S, "none": None}.get(method.direction.source, g_B))
    moved_loss = None
    if functional:
        g_moved, c = passes.pull_back(upper, (moved, x), [S], seen.cotangents)
    else:
        there = passes.base(upper, (moved, x), [S], region="second")
        moved_loss, (g_moved, c) = there.loss, there.g
    if not exact:
        share = seen.weight / jax.numpy.where(weight > 0, weight, 1)
        g_moved = combined(g_B, g_moved, g_S, method.strength)
        leaf = lambda there, here: (method.strength * wide(there) + (share - method.strength) * wide(here)).astype(
            here.dtype
        )
        with regions.in_jax("update"):
            c = jax.tree.map(leaf, c, c_S)
    with regions.in_jax("second backward"):
        (below,) = pull_back_prefix(c)
        g_hat: Params = jax.tree.map(lambda upper, lower: upper + lower, g_moved, below)
    return Outcome(loss, moved_loss, weight, base_norm, length, g_hat, None)
