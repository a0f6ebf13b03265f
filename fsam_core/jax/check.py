"""`check`: whether the loss of `features` is the model's own, by its value and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_core.errors import UserError
from fsam_core.jax import heads, trees
from fsam_core.jax.passes import Features, Params
from fsam_core.jax.step import value_and_grad
from fsam_core.methods import Plain

RTOL = {False: (1e-4, 1e-3), True: (5e-3, 3e-2)}
"""By whether anything is computed in half floats: relative errors of loss and gradient that are rounding."""
FLOOR = 0.1
"""A gradient smaller than this share of the largest is compared with that share, since its own size may be rounding."""


class Deviation(NamedTuple):
    """Relative errors of the loss and of the gradient of the parameter where it is largest."""

    loss: float
    gradient: float


def check(
    features: Features,
    model_loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batch: Any,
    *,
    rtol: float | None = None,
) -> Deviation:
    """Compare the plain loss of `features` with the model's own on one batch, and their gradients.

        check(features, lambda params, batch: cross_entropy(model.apply(params, batch["x"]), batch["y"]), params, batch)

    It sees a scale or a soft-cap of the logits, an adapter on the head, a lost auxiliary loss. Both get the same batch,
    and so the same random keys.

    Args:
        features: as in `value_and_grad`.
        model_loss: (params, batch) -> mean loss over the labels of the batch, a scalar.
        params: a tree of arrays.
        batch: one batch, with labels.
        rtol: the largest relative error of either that passes. None for 1e-4 of the loss and 1e-3 of the gradient; in
            half floats for 5e-3 and 3e-2, where an auxiliary loss with a small coefficient is not seen any more. The
            gradient's error is that of the worst parameter: ‖difference‖ / ‖its gradient‖, or a tenth of the largest
            gradient's norm where that is larger.

    Raises:
        UserError: naming both losses, or the parameter whose gradient deviates most.
    """
    half = False

    def seen(params: Params, batch: Any) -> Any:
        nonlocal half
        head = features(params, batch)
        outputs = jax.tree.leaves(heads.outputs(heads.flat(head)))
        half = half or any(x.dtype in (jnp.bfloat16, jnp.float16) for x in outputs)
        return head

    def both(params: Params) -> Any:
        (ours, _), found = value_and_grad(seen, Plain())(params, batch)
        theirs, expected = jax.value_and_grad(model_loss, allow_int=True)(params, batch)
        return ours, theirs, trees.floats(params, found), trees.floats(params, expected)

    ours, theirs, found, expected = jax.jit(both)(params)
    for_loss, for_gradient = RTOL[half] if rtol is None else (rtol, rtol)
    error = float(abs(ours - theirs)) / max(abs(float(theirs)), 1e-12)
    if not error <= for_loss:
        raise UserError(
            f"features: their loss is {float(ours):.6g} and the model's own {float(theirs):.6g} (relative error "
            f"{error:.2g}); something between the head's input and the loss is not theirs (a scale, a soft-cap, "
            "another loss)"
        )
    worst, name = _worst(found, expected)
    if not worst <= for_gradient:
        raise UserError(
            f"features: the gradient of {name!r} deviates from that of the model's own loss (relative error "
            f"{worst:.2g}); what depends on it is not in their head (an adapter of the head, an auxiliary loss)"
        )
    return Deviation(error, worst)


def _worst(found: Params, expected: Params) -> tuple[float, str]:
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)).ravel()))
    leaves, others = jax.tree.leaves(expected), jax.tree.leaves(found)
    norms = [norm(x) for x in leaves]
    floor = max(FLOOR * max(norms), 1e-30)
    errors = [norm(x - y) / max(size, floor) for x, y, size in zip(leaves, others, norms, strict=True)]
    return max(zip(errors, trees.names(expected), strict=True))
