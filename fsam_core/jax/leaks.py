"""Losses that reach the params by another way than their outputs, which no cotangent of the outputs can see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_core.errors import UserError
from fsam_core.jax import trees
from fsam_core.jax.heads import Heads, LinearHead, Logits, Outputs

ADVICE = "jax.lax.stop_gradient makes it a constant"


def may_leak(head: Any) -> bool:
    """Whether the head has anything that could depend on the params, besides its outputs."""
    if isinstance(head, Heads):
        return head.weights is not None or any(map(may_leak, head.heads))
    return not isinstance(head, LinearHead) or head.token_weights is not None or head.count is not None


def check(head: Any, params: Any) -> None:
    """Check that a head depends on the params only through its outputs.

    Call it where `jax.vjp` traces `features`. Whatever depends on the params is then a tracer of the same trace as
    they are; a label, a batch and a `stop_gradient` are not.

    Args:
        head: what `features` returned.
        params: its argument, a tree of float tracers.

    Raises:
        UserError: naming the parameter, or the shape of what is computed from the params; and for a loss that does not
            return one float.
    """
    tracers = [x for x in jax.tree.leaves(params) if isinstance(x, jax.core.Tracer)]
    _check(head, {_trace(x) for x in tracers}, dict(zip(map(id, tracers), trees.names(params), strict=False)))


def _check(head: Any, traces: set[Any], names: dict[int, str]) -> None:
    reached = lambda x: isinstance(x, jax.core.Tracer) and _trace(x) in traces

    def what(x: Any) -> str:
        return names.get(id(x)) or f"an array {x.dtype}{list(x.shape)} computed from the params"

    def constant(name: str, value: Any) -> None:
        if reached(value):
            raise UserError(f"{name} must not depend on the params, got {what(value)}; {ADVICE}")

    if isinstance(head, Heads):
        for weight in head.weights or ():
            constant("Heads: weights", weight)
        for one in head.heads:
            _check(one, traces, names)
    elif isinstance(head, LinearHead):
        constant("LinearHead: token_weights", head.token_weights)
        constant("LinearHead: count", head.count)
    elif isinstance(head, Outputs | Logits):
        kind = type(head).__name__
        constant(f"{kind}: weight", head.weight)
        traced, shape = jax.make_jaxpr(head.loss, return_shape=True)(
            head.logits if isinstance(head, Logits) else head.outputs
        )
        for x in traced.consts:
            if reached(x):
                raise UserError(f"{kind}: loss reaches {what(x)} by another way than its outputs; {ADVICE}")
        if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise UserError(f"{kind}: loss must return one float, a scalar; got {shape}")


def _trace(x: Any) -> Any:
    """The trace that a tracer belongs to; one `jax.vjp` may have several trace objects, with one tag."""
    return getattr(x._trace, "tag", x._trace)
