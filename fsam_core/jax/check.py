"""`check`: whether the loss of `features` is the model's own, by its value and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_core.checking import Deviation, deviation
from fsam_core.jax import heads, trees
from fsam_core.jax.passes import Features, Params
from fsam_core.jax.step import value_and_grad
from fsam_core.methods import Plain


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
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)).ravel()))
    leaves = zip(trees.names(expected), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    gradients = {name: (norm(own - x), norm(own)) for name, x, own in leaves}
    return deviation(float(ours), float(theirs), gradients, half=half, rtol=rtol)
