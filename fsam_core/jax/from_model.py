"""`features` from a whole flax.linen model: the input of its head is captured in front of the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_core.jax.heads import LinearHead
from fsam_core.jax.passes import Features, Params
from fsam_core.split import IGNORED, Of, part_of
from fsam_kernels.options import CROSS_ENTROPY, Layout, Loss


def from_model(
    call: Callable[[Params, Any], Any],
    head: str = "lm_head",
    labels: Of = "labels",
    *,
    shift: bool = False,
    token_weights: Of = None,
    loss: Loss = CROSS_ENTROPY,
    ignore_index: int | None = None,
    count: Of = None,
) -> Features:
    """`features` that call the whole model and capture the input of its head, which must be a plain linear layer.

        features = from_model(lambda params, batch: model.apply(params, batch["tokens"]), "lm_head", labels="labels")

    What the model does to the logits afterwards is not seen (a soft-cap or a scale; give `loss` for the former):
    `check` compares with the model's own loss. The compiler drops the model's own logits, which nothing reads.

    Args:
        call: (params, batch) -> anything; it applies a flax.linen model.
        head: the path of the module, joined by dots, or the end of it: an `nn.Dense`, or an `nn.Embed` whose `attend`
            makes the logits.
        labels: [...] integers beside the head's input [..., D]: a key of the batch, an index of a tuple, or a function
            of the batch. A negative label is ignored.
        shift: whether the label of a position is the next one's. The last position is then ignored, and token weights
            move with their labels.
        token_weights: [...] as `labels` is given; None for 1.
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is ignored too.
        count: as in `LinearHead`: a key, an index or a function of the batch.

    Raises:
        UserError: from the features, for a head that is not called exactly once, or is no plain linear layer.
    """
    backends.require("flax")

    def features(params: Params, batch: Any) -> LinearHead:
        hidden, weight, bias, layout = _captured(call, params, batch, head)
        y, weights = part_of(batch, labels), part_of(batch, token_weights)
        if shift:
            y = _next(y, IGNORED)
            weights = None if weights is None else _next(weights, 0)
        return LinearHead(hidden, weight, y, weights, bias, layout, loss, ignore_index, part_of(batch, count))

    return features


def _next(x: jax.Array, last: Any) -> jax.Array:
    return jnp.concatenate([x[..., 1:], jnp.full_like(x[..., :1], last)], -1)


def _captured(
    call: Callable[[Params, Any], Any], params: Params, batch: Any, head: str
) -> tuple[Any, Any, Any, Layout]:
    import flax.linen as nn

    found: list[Any] = []
    others: set[str] = set()

    def intercept(forward: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, ".".join(context.module.path)
        is_embed = isinstance(module, nn.Embed)
        if context.method_name == ("attend" if is_embed else "__call__"):
            if f".{path}".endswith(f".{head}"):
                found.append(_linear(module, path, [*args, *kwargs.values()][0]))
            elif is_embed or isinstance(module, nn.Dense):
                others.add(path)
        return forward(*args, **kwargs)

    with nn.intercept_methods(intercept):
        call(params, batch)
    if not found:
        has = ", ".join(sorted(others)) or "none of flax.linen; write features yourself for another library"
        raise UserError(f"head: {head!r} was not called as a linear layer; those that were: {has}")
    if len(found) > 1:
        raise UserError(f"head: {head!r} was called {len(found)} times; write features with Heads for several products")
    return found[0]


def _linear(module: Any, path: str, x: Any) -> tuple[Any, Any, Any, Layout]:
    """(hidden in the dtype of the product, weight, bias, layout) of a Dense or an Embed that is called with x.

    Raises:
        UserError: for a module whose forward is no plain linear layer.
    """
    import flax.linen as nn
    from flax.core import meta

    is_dense = isinstance(module, nn.Dense) and type(module).__call__ is nn.Dense.__call__
    is_dense = is_dense and module.dot_general is module.dot_general_cls is None
    if not is_dense and getattr(type(module), "attend", None) is not nn.Embed.attend:
        raise UserError(
            f"head: {path!r} is a {type(module).__name__}, which is no plain linear layer (nn.Dense, nn.Embed.attend); "
            "write features that return its hidden states and weight"
        )
    of = lambda name: meta.unbox(module.get_variable("params", name))
    weight = of("kernel" if is_dense else "embedding")
    bias = of("bias") if is_dense and module.use_bias else None
    hidden, *_ = module.promote_dtype(x, weight, bias, dtype=module.dtype)
    return hidden, weight, bias, "DV" if is_dense else "VD"
