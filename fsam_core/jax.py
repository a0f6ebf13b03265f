"""The step in JAX: a gradient function to put where `jax.value_and_grad` stands.

    method = FunctionalSAM(rho=0.5, precondition="adam")
    grad = value_and_grad(features, method, b2=0.95)          # features(params, batch) -> LinearHead or Logits
    (loss, info), grads = grad(params, batch, opt_state)      # pure: jit, shard and donate it as usual
    updates, opt_state = tx.update(grads, opt_state, params)

Nothing here keeps state. Randomness comes in with the batch (put the key in it), so both passes see the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from fsam_core import backends, parts
from fsam_core.errors import UserError
from fsam_core.heads import check_shapes
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Method, Perturbed, Plain

backends.require("jax")
backends.require("optax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

__all__ = [
    "SAM",
    "FunctionalSAM",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Plain",
    "UserError",
    "skip_nonfinite",
    "value_and_grad",
]

Params = Any
Features = Callable[[Params, Any], "LinearHead | Logits"]


@dataclass(frozen=True)
class LinearHead:
    """A model's output as hidden states and head weight; the loss is the weighted mean cross entropy of their product.

    Attributes:
        hidden: [..., D] last hidden states, any float dtype.
        weight: [V, D] the head's weight, as a function of the params (tied to the embedding or not).
        labels: [...] integers; a negative one is ignored.
        token_weights: [...] weight of each label in the mean, or None for 1.
    """

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array
    token_weights: jax.Array | None = None


@dataclass(frozen=True)
class Logits:
    """The output of a model without a linear head.

    Attributes:
        logits: array of any shape, a function of the params.
        loss: logits -> mean loss, a scalar; it must not depend on the params in another way.
        weight: how much this micro-batch counts beside others (its number of targets, say).
    """

    logits: jax.Array
    loss: Callable[[jax.Array], jax.Array]
    weight: jax.Array | float = 1.0


class Info(NamedTuple):
    """What a step saw, each a scalar array."""

    loss: jax.Array
    """Mean loss at θ."""
    perturbed_loss: jax.Array
    """Mean loss at θ+ε, on S, where the method evaluates it (sam, logit), else NaN."""
    weight: jax.Array
    """Sum of the token weights over all micro-batches."""
    base_norm: jax.Array
    """‖g‖₂ of the plain gradient."""
    grad_norm: jax.Array
    """‖ĝ‖₂ of the gradient that is returned, before clipping."""
    perturbation_norm: jax.Array
    """‖ε‖₂; 0 where nothing is perturbed."""
    finite: jax.Array
    """Whether both passes were finite. Where not, every returned gradient is NaN, so that `skip_nonfinite` skips it."""


def value_and_grad(
    features: Features,
    method: Method,
    *,
    b2: float | None = None,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    backend: str | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Info], Params]]:
    """The gradient function of `method`.

    Args:
        features: (params, batch) -> `LinearHead` or `Logits`. Evaluated at θ on the whole batch and at θ+ε on the part
            that carries the correction, in calls of their own.
        method: one of `Plain`, `SAM`, `FunctionalSAM`, `LogitSAM`.
        b2, eps: those of the optax Adam that receives the gradient; `b2` is needed with precondition="adam", because an
            optax state does not hold it.
        clip_norm: the global norm that the optax chain clips to, if it does. It scales the gradient inside the second
            moment of the ascent direction; the returned gradient is not clipped.
        backend: "xla", "pallas" or "auto" (default: FSAM_BACKEND, then auto).

    Returns:
        grad(params, batch, opt_state=None) -> ((loss, Info), gradients like params). `batch` is any tree; a list is
        taken as micro-batches, whose gradient is that of one batch of them all, each token weighing the same.
        `opt_state` is any optax state that holds one Adam state; it is needed with precondition="adam" or when ρ is a
        schedule. With a `fraction` below 1 a batch that is no list is cut along the first axis of its arrays.

    Raises:
        UserError: for an unknown backend, a preconditioned method without b2, b2 outside [0, 1) or clip_norm ≤ 0.
    """
    if not isinstance(method, Plain | Perturbed):
        raise UserError(f"method must be Plain(), SAM(...), FunctionalSAM(...) or LogitSAM(...), got {method!r}")
    if isinstance(method, Perturbed) and method.precondition == "adam" and b2 is None:
        raise UserError("b2 is missing: precondition='adam' needs the b2 of your optax.adamw, e.g. b2=0.95")
    if b2 is not None and not 0 <= b2 < 1:
        raise UserError(f"b2 must be in [0, 1), as that of your optax.adamw; got {b2!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm must be > 0, or None for no clipping; got {clip_norm!r}")
    ops = backends.load("jax", backend)

    def grad(params: Params, batch: Any, opt_state: Any = None) -> tuple[tuple[jax.Array, Info], Params]:
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise UserError("batch: got an empty list of micro-batches; give at least one")
        moved_loss = jnp.float32(jnp.nan)
        if isinstance(method, Plain):
            loss, weight, g_B, _ = _base_pass(ops, features, params, _stacked(batches))
            g_hat, length = g_B, jnp.zeros_like(loss)
        else:
            part, rest = parts.split(batches, method.fraction, _flatten)
            S = _stacked(part)
            loss, weight, g_S, cotangents = _base_pass(ops, features, params, S)
            g_B = g_S
            if rest:
                others = _base_pass(ops, features, params, _stacked(rest))[:3]
                loss, weight, g_B = _merged((loss, weight, g_S), others)
            g = g_B if method.ascent == "full" else g_S
            clip = _clip_factor(_norm(g), clip_norm)
            moved, length = _perturbed(ops, method, params, g, opt_state, clip, b2, eps)
            if method.path == "functional":  # J(θ+ε)ᵀ z̄(θ)
                g_moved = _pull_back(ops, features, moved, S, cotangents)
            elif method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
                moved_loss, _, g_moved, _ = _base_pass(ops, features, moved, S)
            else:  # J(θ)ᵀ z̄(θ+ε)
                moved_loss, cotangents = _cotangent_pass(ops, features, moved, S)
                g_moved = _pull_back(ops, features, params, S, cotangents)
            g_hat = g_moved if method.exact else _corrected(g_B, g_moved, g_S, method.strength)
        base_norm = _norm(g_B)

        norm = _norm(g_hat)
        finite = jnp.isfinite(loss) & jnp.isfinite(base_norm) & jnp.isfinite(length) & jnp.isfinite(norm)
        if method.path in ("sam", "logit"):
            finite &= jnp.isfinite(moved_loss)
        g_hat = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), g_hat)
        return (loss, Info(loss, moved_loss, weight, base_norm, norm, length, finite)), g_hat

    return grad


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, but a step whose gradient is not finite changes neither weights nor moments and is counted.

    It is `optax.apply_if_finite` without its limit: the count is `state.total_notfinite`.
    """
    return optax.apply_if_finite(tx, max_consecutive_errors=2**31 - 1)


def adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    """The one Adam state inside an optax state, however it is wrapped.

    Raises:
        UserError: when there is none or more than one.
    """
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    if len(found) != 1:
        got = "None" if opt_state is None else f"{len(found)} in {type(opt_state).__name__}"
        raise UserError(f"opt_state must hold one Adam state (optax.adam, adamw, scale_by_adam, …), got {got}")
    return found[0]


# --- the passes -------------------------------------------------------------------------------------------------------


class _Cotangents(NamedTuple):
    """z̄ of every micro-batch, its share of all the targets, and the head weight where they were kept without it."""

    each: Any
    share: Any
    weight_VxD: jax.Array | None


def _base_pass(ops: ModuleType, features: Features, params: Params, items: Any) -> Any:
    """(loss, total weight, J(θ)ᵀ z̄(θ), z̄(θ)) over all micro-batches."""

    def one(item: Any) -> Any:
        head, pull_back = _linearize(features, params, item)
        loss, weight, cotangent = _cotangent(ops, head)
        g = pull_back(_through_head(ops, cotangent, head))
        return (loss, weight, g), (_without_weight(cotangent, items), weight)

    (loss, weight, g), (cotangents, weights) = _mean(one, items)
    g = jax.tree.map(lambda x, p: x.astype(p.dtype), g, params)
    return loss, weight, g, _kept(features, params, items, cotangents, weights, weight)


def _cotangent_pass(ops: ModuleType, features: Features, params: Params, items: Any) -> Any:
    """(loss, z̄) over all micro-batches: a forward pass alone."""

    def one(item: Any) -> Any:
        head = _flat(features(params, item))
        loss, weight, cotangent = _cotangent(ops, head)
        return (loss, weight, ()), (_without_weight(cotangent, items), weight)

    (loss, weight, _), (cotangents, weights) = _mean(one, items)
    return loss, _kept(features, params, items, cotangents, weights, weight)


def _pull_back(ops: ModuleType, features: Features, params: Params, items: Any, cotangents: _Cotangents) -> Params:
    """J(params)ᵀ z̄ with the Jacobian at these params and cotangents from anywhere: no logits, no loss."""

    def one(item: Any) -> Any:
        batch, cotangent, share = item
        head, pull_back = _linearize(features, params, batch)
        if isinstance(head, LinearHead):
            cotangent = cotangent._replace(weights_N=cotangent.weights_N * share.astype(cotangent.weights_N.dtype))
            if cotangents.weight_VxD is not None:
                cotangent = cotangent._replace(w_VxD=cotangents.weight_VxD)
        else:
            cotangent = cotangent * share.astype(cotangent.dtype)
        return jax.tree.map(_wide, pull_back(_through_head(ops, cotangent, head))), ()

    g = _sum(one, _zipped(items, cotangents.each, cotangents.share))[0]
    return jax.tree.map(lambda x, p: x.astype(p.dtype), g, params)


def _linearize(features: Features, params: Params, batch: Any) -> tuple[Any, Callable[[Any], Params]]:
    """(the head at these params, Jᵀ as a function of the cotangents of hidden and weight, or of the logits)."""
    seen = []

    def outputs(params: Params) -> tuple[jax.Array, ...]:
        head = _flat(features(params, batch))
        seen.append(head)
        return (head.hidden, head.weight) if isinstance(head, LinearHead) else (head.logits,)

    out, pull_back = jax.vjp(outputs, params)
    # Labels, weights and the loss do not depend on the params, so they may leave the trace that vjp made.
    if isinstance(head := seen[-1], LinearHead):
        head = LinearHead(out[0], out[1], head.labels, head.token_weights)
    else:
        head = Logits(out[0], head.loss, head.weight)
    return head, lambda cotangents: pull_back(cotangents)[0]


def _flat(head: Any) -> Any:
    """The head checked, with its leading axes made one and weights where there were none."""
    if isinstance(head, Logits):
        return head
    if not isinstance(head, LinearHead):
        raise UserError(f"features must return a LinearHead or Logits, got {type(head).__name__}")
    h, y, weights = head.hidden, head.labels, head.token_weights
    check_shapes(h, head.weight, y, weights)
    y = y.reshape(-1).astype(jnp.int32)
    kind = jnp.promote_types(h.dtype, jnp.float32)
    weights = jnp.ones(y.shape, kind) if weights is None else weights.reshape(-1).astype(kind)
    return LinearHead(h.reshape(-1, h.shape[-1]), head.weight, y, jnp.where(y >= 0, weights, 0))


def _cotangent(ops: ModuleType, head: LinearHead | Logits) -> tuple[jax.Array, jax.Array, Any]:
    """(mean loss, weight, z̄) of one micro-batch; loss 0 where every label is ignored."""
    if isinstance(head, Logits):
        loss, zbar = jax.value_and_grad(head.loss)(head.logits)
        weight = jnp.asarray(head.weight, loss.dtype)
        # A mean over no targets is 0/0; it weighs nothing.
        return jnp.where(weight > 0, loss, 0), weight, jnp.where(weight > 0, zbar, 0)
    assert head.token_weights is not None
    weight = jnp.sum(head.token_weights)
    share_N = head.token_weights / jnp.where(weight > 0, weight, 1)
    loss_N, _, cotangent = ops.linear_cross_entropy(head.hidden, head.weight, head.labels, share_N)
    return jnp.sum(loss_N * share_N), weight, cotangent


def _through_head(ops: ModuleType, cotangent: Any, head: LinearHead | Logits) -> tuple[jax.Array, ...]:
    """What z̄ is at the outputs of `_linearize`."""
    if isinstance(head, Logits):
        return (cotangent.astype(head.logits.dtype),)
    return ops.logit_vjp(cotangent, head.hidden, head.weight)


def _merged(a: Any, b: Any) -> Any:
    """(loss, weight, g) of two sets of micro-batches together."""
    total = a[1] + b[1]
    x, y = (w / jnp.where(total > 0, total, 1) for w in (a[1], b[1]))
    mean = lambda p, q: (_wide(p) * x + _wide(q) * y).astype(p.dtype)
    return mean(a[0], b[0]), total, jax.tree.map(mean, a[2], b[2])


def _corrected(g_B: Params, g_moved: Params, g_S: Params, strength: float) -> Params:
    """ĝ = g_B + w (g'_S − g_S)."""
    leaf = lambda b, moved, s: (_wide(b) + strength * (_wide(moved) - _wide(s))).astype(b.dtype)
    return jax.tree.map(leaf, g_B, g_moved, g_S)


# --- the perturbation -------------------------------------------------------------------------------------------------


def _perturbed(
    ops: ModuleType,
    method: Perturbed,
    params: Params,
    g: Params,
    opt_state: Any,
    clip: jax.Array,
    b2: float | None,
    eps: float,
) -> tuple[Params, jax.Array]:
    """(θ + ε, ‖ε‖₂); ε = 0 where the gradient is 0."""
    v, adam, count = None, None, 0
    if method.precondition == "adam" or callable(method.rho):
        state = adam_state(opt_state)
        count = state.count
    if method.precondition == "adam":
        assert b2 is not None
        g, v = _moments(g, state.nu)
        current = method.second_moment == "current"
        used = count + current  # steps that the moment has seen
        correction = jnp.where(used > 0, 1 - b2**used, 1)
        adam = ops.Adam(b2, eps, correction, current)
    sumsq, dot = ops.preconditioned_norm(g, v, clip=clip, adam=adam)
    square = sumsq if method.norm == "l2" else dot
    scale = jnp.where(square == 0, 0, method.rho_at(count) * jax.lax.rsqrt(jnp.where(square == 0, 1, square)))
    return ops.perturb(params, g, v, scale, clip=clip, adam=adam), scale * jnp.sqrt(sumsq)


def _moments(g: Params, nu: Any) -> tuple[Params, Params]:
    """(g, v) for the direction; a parameter that Adam is masked from does not move: both are 0 there."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    kept = jax.tree.map(lambda v: not is_masked(v), nu, is_leaf=is_masked)
    structures: list[Any] = [jax.tree.structure(kept), jax.tree.structure(g)]
    if structures[0] != structures[1]:
        raise UserError("opt_state: its Adam state is not of these params; give the one that tx.init(params) made")
    pick = lambda tree: jax.tree.map(lambda keep, x, like: x if keep else jnp.zeros_like(like), kept, tree, g)
    return pick(g), pick(jax.tree.map(lambda v: 0 if is_masked(v) else v, nu, is_leaf=is_masked))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(tree: Any) -> jax.Array:
    """‖·‖₂ over all leaves, summed in float32 or wider."""
    return optax.tree.norm(jax.tree.map(_wide, tree))


def _clip_factor(norm: jax.Array, clip_norm: float | None) -> jax.Array:
    """What `optax.clip_by_global_norm` would multiply the gradient by."""
    if clip_norm is None:
        return jnp.ones((), norm.dtype)
    return jnp.where(norm > clip_norm, clip_norm / norm, 1)


# --- micro-batches ----------------------------------------------------------------------------------------------------


class _Stack(NamedTuple):
    """Micro-batches of one shape, stacked, so that `lax.scan` compiles their pass once however many they are."""

    tree: Any


def _flatten(batch: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, tree = jax.tree.flatten(batch)
    return leaves, lambda leaves: jax.tree.unflatten(tree, leaves)


def _stacked(batches: list[Any]) -> Any:
    """`batches` as a `_Stack` where that is possible and worth it, else as it is."""
    if len(batches) == 1 or not all(hasattr(x, "shape") for x in jax.tree.leaves(batches)):
        return batches
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), b) for b in batches]
    if any(s != shapes[0] for s in shapes):
        return batches
    return _Stack(jax.tree.map(lambda *x: jnp.stack(x), *batches))


def _zipped(items: Any, *others: Any) -> Any:
    if isinstance(items, _Stack):
        return _Stack((items.tree, *others))
    return list(zip(items, *others, strict=True))


def _first(items: Any) -> Any:
    return jax.tree.map(lambda x: x[0], items.tree) if isinstance(items, _Stack) else items[0]


def _sum(one: Callable[[Any], tuple[Any, Any]], items: Any) -> tuple[Any, Any]:
    """one(item) -> (summed, kept); returns the sum of the first over all items and the second of each."""
    if isinstance(items, _Stack):
        first = jax.eval_shape(lambda: one(_first(items))[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def body(total: Any, item: Any) -> Any:
            summed, kept = one(item)
            return jax.tree.map(jnp.add, total, summed), kept

        return jax.lax.scan(body, zeros, items.tree)
    summed, kept = zip(*map(one, items), strict=True)
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *summed), list(kept)


def _mean(one: Callable[[Any], tuple[Any, Any]], items: Any) -> tuple[Any, Any]:
    """As `_sum` for one(item) -> ((loss, weight, g), kept): loss and g are means, each micro-batch by its weight."""
    if isinstance(items, list) and len(items) == 1:
        summed, kept = one(items[0])
        return summed, ([kept[0]], [kept[1]])

    def weighted(item: Any) -> Any:
        (loss, weight, g), kept = one(item)
        return (loss * weight, weight, jax.tree.map(lambda x: _wide(x) * weight, g)), kept

    (loss, weight, g), kept = _sum(weighted, items)
    safe = jnp.where(weight > 0, weight, 1)
    if isinstance(items, list):
        kept = tuple(map(list, zip(*kept, strict=True)))
    return (loss / safe, weight, jax.tree.map(lambda x: x / safe, g)), kept


def _without_weight(cotangent: Any, items: Any) -> Any:
    stacked = isinstance(items, _Stack) and hasattr(cotangent, "w_VxD")
    return cotangent._replace(w_VxD=None) if stacked else cotangent


def _kept(features: Features, params: Params, items: Any, each: Any, weights: Any, total: jax.Array) -> _Cotangents:
    share = jax.tree.map(lambda w: w / jnp.where(total > 0, total, 1), weights)
    if not isinstance(items, _Stack) or not hasattr(each, "w_VxD"):
        return _Cotangents(each, share, None)
    # A scan would stack a copy of the head weight for each micro-batch. It is the same for all: this evaluates the
    # model once more for its sake, and the compiler drops all of that but the weight.
    return _Cotangents(each, share, jnp.asarray(features(params, _first(items)).weight))
