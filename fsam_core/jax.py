"""The step in JAX: a gradient function to put where `jax.value_and_grad` stands.

    method = FunctionalSAM(rho=0.5, precondition="adam")
    grad = value_and_grad(features, method, b2=0.95)          # features(params, batch) -> LinearHead or Logits
    (loss, info), grads = grad(params, batch, opt_state)      # pure: jit, shard and donate it as usual
    updates, opt_state = tx.update(grads, opt_state, params)

Nothing here keeps state. Randomness comes in with the batch (put the key in it), so both passes see the same dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from fsam_core import backends, parts
from fsam_core.errors import UserError
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Method, Perturbed, Plain

backends.require("jax")
backends.require("optax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from fsam_core import jax_heads as heads  # noqa: E402
from fsam_core.jax_heads import LinearHead, Logits  # noqa: E402
from fsam_kernels.memory import AUTO, Memory  # noqa: E402
from fsam_kernels.options import Loss  # noqa: E402

__all__ = [
    "SAM",
    "FunctionalSAM",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Loss",
    "Memory",
    "Plain",
    "UserError",
    "mean_loss",
    "skip_nonfinite",
    "value_and_grad",
]

Params = Any
Features = Callable[[Params, Any], "LinearHead | Logits"]


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
    memory: Memory = AUTO,
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
        memory: what may be spent on the head: working bytes, and whether its cotangent is kept or recomputed.
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
    run = _Run(backends.load("jax", backend), features, memory)

    def grad(params: Params, batch: Any, opt_state: Any = None) -> tuple[tuple[jax.Array, Info], Params]:
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise UserError("batch: got an empty list of micro-batches; give at least one")
        moved_loss = jnp.float32(jnp.nan)
        if isinstance(method, Plain):
            loss, weight, g_B, _ = _base_pass(run, params, _stacked(batches))
            g_hat, length = g_B, jnp.zeros_like(loss)
        else:
            part, rest = parts.split(batches, method.fraction, _flatten)
            S = _stacked(part)
            loss, weight, g_S, cotangents = _base_pass(run, params, S, keep=method.path == "functional", cut=method.cut)
            g_B = g_S
            if rest:
                others = _base_pass(run, params, _stacked(rest))[:3]
                loss, weight, g_B = _merged((loss, weight, g_S), others)
            g = g_B if method.ascent == "full" else g_S
            clip = _clip_factor(_norm(g), clip_norm)
            moved, length = _perturbed(run.ops, method, params, g, opt_state, clip, b2, eps)
            if method.path == "functional":  # J(θ+ε)ᵀ z̄(θ)
                g_moved = _pull_back(run, moved, S, cotangents)
            elif method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
                moved_loss, _, g_moved, _ = _base_pass(run, moved, S)
            else:  # J(θ)ᵀ z̄(θ+ε)
                moved_loss, cotangents = _cotangent_pass(run, moved, S)
                g_moved = _pull_back(run, params, S, cotangents)
            g_hat = g_moved if method.exact else _corrected(g_B, g_moved, g_S, method.strength)
        base_norm = _norm(g_B)

        norm = _norm(g_hat)
        finite = jnp.isfinite(loss) & jnp.isfinite(base_norm) & jnp.isfinite(length) & jnp.isfinite(norm)
        if method.path in ("sam", "logit"):
            finite &= jnp.isfinite(moved_loss)
        g_hat = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), g_hat)
        return (loss, Info(loss, moved_loss, weight, base_norm, norm, length, finite)), g_hat

    return grad


def mean_loss(
    features: Features, *, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[Params, Any], jax.Array]:
    """(params, batch) -> mean loss with the same head, for evaluation: no gradient, no N×V array."""
    ops = backends.load("jax", backend)

    def loss(params: Params, batch: Any) -> jax.Array:
        head = heads.flat(features(params, batch))
        return heads.cotangent(ops, head, memory, gradient=False, keep=False)[0]

    return loss


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


class _Run(NamedTuple):
    """What is the same in every pass of a step."""

    ops: ModuleType
    features: Features
    memory: Memory


class _Cotangents(NamedTuple):
    """z̄ of every micro-batch, its share of all the targets, and what all micro-batches have in common.

    Cut at the logits that is the head's (weight, bias), where they were kept without it. Cut at the hidden states
    (`is_hidden`), where z̄ stands for h̄, it is the head's own gradient (w̄, b̄).
    """

    each: Any
    share: Any
    common: tuple[jax.Array, ...]
    is_hidden: bool


def _base_pass(run: _Run, params: Params, items: Any, *, keep: bool = False, cut: str = "logits") -> Any:
    """(loss, total weight, J(θ)ᵀ z̄(θ), z̄(θ)) over all micro-batches; `keep` if z̄ is to be used again."""

    def one(item: Any) -> Any:
        head, pull_back = _linearize(run.features, params, item)
        holds = keep and cut == "logits" and heads.keeps(head, _count(items), run.memory)
        loss, weight, zbar, out = heads.cotangent(run.ops, head, run.memory, gradient=True, keep=holds)
        assert out is not None
        if cut == "logits":
            return (loss, weight, (pull_back(out), ())), (_without_head(zbar, items), weight)
        if isinstance(head, Logits):
            raise UserError("cut: 'hidden' needs features to return a LinearHead, got Logits")
        return (loss, weight, (pull_back(out), out[1:])), (out[0], weight)

    (loss, weight, (g, of_head)), (each, weights) = _mean(one, items)
    g = jax.tree.map(lambda x, p: x.astype(p.dtype), g, params)
    if cut == "hidden":
        return loss, weight, g, _Cotangents(each, _shares(weights, weight), of_head, True)
    return loss, weight, g, _kept(run, params, items, each, weights, weight)


def _cotangent_pass(run: _Run, params: Params, items: Any) -> Any:
    """(loss, z̄) over all micro-batches: a forward pass alone."""

    def one(item: Any) -> Any:
        head = heads.flat(run.features(params, item))
        holds = heads.keeps(head, _count(items), run.memory)
        loss, weight, zbar, _ = heads.cotangent(run.ops, head, run.memory, gradient=False, keep=holds)
        return (loss, weight, ()), (_without_head(zbar, items), weight)

    (loss, weight, _), (each, weights) = _mean(one, items)
    return loss, _kept(run, params, items, each, weights, weight)


def _pull_back(run: _Run, params: Params, items: Any, cotangents: _Cotangents) -> Params:
    """J(params)ᵀ z̄ with the Jacobian at these params and cotangents from anywhere: no logits, no loss."""

    def one(item: Any) -> Any:
        batch, zbar, share = item
        head, pull_back = _linearize(run.features, params, batch)
        if cotangents.is_hidden:
            hidden, *rest = heads.outputs(head)
            out: Any = ((zbar * share).astype(hidden.dtype), *map(jnp.zeros_like, rest))
        else:
            if cotangents.common:
                weight_VxD, *bias_V = cotangents.common
                zbar = dataclasses.replace(zbar, w_VxD=weight_VxD, bias_V=bias_V[0] if bias_V else None)
            out = heads.pulled_back(run.ops, head, zbar, share, run.memory)
        return jax.tree.map(_wide, pull_back(out)), ()

    g = _sum(one, _zipped(items, cotangents.each, cotangents.share))[0]
    if cotangents.is_hidden:
        # The head's own gradient, once for all micro-batches. Of the model this evaluates, the compiler keeps nothing
        # but the way from the parameters to the head's weight.
        _, pull_back = jax.vjp(lambda p: _head_weights(run, p, items), params)
        like = _head_weights(run, params, items)
        (of_head,) = pull_back(tuple(x.astype(w.dtype) for x, w in zip(cotangents.common, like, strict=True)))
        g = jax.tree.map(lambda x, y: x + y.astype(x.dtype), g, of_head)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), g, params)


def _linearize(features: Features, params: Params, batch: Any) -> tuple[Any, Callable[[Any], Params]]:
    """(the head at these params, Jᵀ as a function of the cotangents of its `outputs`)."""
    seen = []

    def outputs(params: Params) -> tuple[jax.Array, ...]:
        seen.append(heads.flat(features(params, batch)))
        return heads.outputs(seen[-1])

    out, pull_back = jax.vjp(outputs, params)
    # Labels, weights and the loss do not depend on the params, so they may leave the trace that vjp made.
    return heads.with_outputs(seen[-1], out), lambda cotangents: pull_back(cotangents)[0]


def _head_weights(run: _Run, params: Params, items: Any) -> tuple[jax.Array, ...]:
    """(weight, bias) of the head, which are the same for every micro-batch."""
    return heads.outputs(heads.flat(run.features(params, _first(items))))[1:]


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


def _count(items: Any) -> int:
    return len(jax.tree.leaves(items.tree)[0]) if isinstance(items, _Stack) else len(items)


def _is_recomputed(zbar: Any) -> bool:
    """Whether a cotangent holds the head it was made at."""
    return getattr(zbar, "h_NxD", None) is not None


def _without_head(zbar: Any, items: Any) -> Any:
    if not isinstance(items, _Stack) or not _is_recomputed(zbar):
        return zbar
    return dataclasses.replace(zbar, w_VxD=None, bias_V=None)


def _shares(weights: Any, total: jax.Array) -> Any:
    return jax.tree.map(lambda w: w / jnp.where(total > 0, total, 1), weights)


def _kept(run: _Run, params: Params, items: Any, each: Any, weights: Any, total: jax.Array) -> _Cotangents:
    # A scan would stack a copy of the head weight for each micro-batch. It is the same for all: this evaluates the
    # model once more for its sake, and the compiler drops all of that but the weight.
    lacks = isinstance(items, _Stack) and _is_recomputed(each)
    return _Cotangents(each, _shares(weights, total), _head_weights(run, params, items) if lacks else (), False)
