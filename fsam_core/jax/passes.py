"""The passes of a step in JAX: gradients, and cotangents for another pass. All are pure functions of trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_core import regions, split
from fsam_core.errors import UserError
from fsam_core.heads import check_outputs, of_batch
from fsam_core.jax import heads, leaks, meshes
from fsam_core.jax.heads import FlatHeads, LinearHead
from fsam_core.split import MicroBatches
from fsam_kernels.memory import Memory

Params = Any
Features = Callable[[Params, Any], Any]
"""(params, batch) -> a head, or (a head, aux) with has_aux"""

jax.tree_util.register_pytree_with_keys(
    MicroBatches,
    lambda x: ([(jax.tree_util.SequenceKey(i), batch) for i, batch in enumerate(x)], None),
    lambda _, batches: MicroBatches(batches),
)


class PassConfig(NamedTuple):
    """The arguments that all passes of a step share."""

    ops: ModuleType
    features: Features
    memory: Memory
    has_aux: bool = False


class Cotangents(NamedTuple):
    """z̄ of every micro-batch, its share of all targets, and values common to all micro-batches.

    z̄ and `common` have an entry for each part of the head. With the cut at the logits, that of `common` is the part's
    (weight, bias) if its cotangents are stored without it, and `common` is () if none are. With the cut at the hidden
    states (`is_hidden`), z̄ of a linear part is h̄ and its entry in `common` is the head's own gradient (w̄, b̄).
    """

    each: Any
    share: Any
    common: tuple[tuple[jax.Array, ...], ...]
    is_hidden: bool


class PassResult(NamedTuple):
    """The results of a pass over micro-batches: mean loss, weight, Jᵀ z̄ or None, and z̄ or None.

    `aux` has an entry for each micro-batch; `bad_label` is that of `heads.bad_label` over all of them.
    """

    loss: jax.Array
    weight: jax.Array
    g: Any
    cotangents: Cotangents | None
    aux: list[Any]
    bad_label: jax.Array


def loss_and_grad(
    config: PassConfig,
    params: Params,
    items: Any,
    *,
    backward: bool = True,
    keep: bool = False,
    cut: str = "logits",
    region: str = "base",
) -> PassResult:
    """Loss and z̄ at `params` over all micro-batches; `backward` also gives Jᵀ z̄, `keep` z̄ for another pass."""
    hidden = keep and cut == "hidden"

    def one(item: Any) -> Any:
        if backward:
            head, vjp_fn, aux = _linearize(config, params, item, region, checked=True)
        else:
            with regions.in_jax(_named(region, "forward")):
                found, aux = called(config, params, item)
                if leaks.may_leak(found):
                    jax.eval_shape(lambda p: jax.vjp(lambda p: _checked(config, p, item), p)[0], params)
                head, vjp_fn = heads.flat(found), None
        if keep:
            check_outputs(x.ndim for of in heads.outputs(head) for x in of)
        holds = keep and not hidden and heads.keeps(head, _count(items), config.memory)
        with regions.in_jax(_named(region, "backward" if backward else "forward")):
            loss, weight, zbar, out = heads.cotangent(
                config.ops, head, config.memory, gradient=backward or hidden, keep=holds
            )
            g = () if vjp_fn is None else vjp_fn(out)
            bad = heads.bad_label(head)
        kept: Any = _without_heads(zbar, items) if keep else ()
        of_head: Any = ()
        if hidden:
            assert out is not None
            kept, of_head = heads.cut_at_hidden(head, zbar, out)
        return (loss, weight, (g, of_head)), (kept, weight, aux, bad)

    (loss, weight, (g, of_head)), (each, weights, aux, bad) = micro_batch_mean(one, items)
    g = jax.tree.map(lambda x, p: x.astype(p.dtype), g, params) if backward else None
    if not keep:
        cotangents = None
    elif hidden:
        cotangents = Cotangents(each, _shares(weights, weight), of_head, True)
    else:
        cotangents = _kept(config, params, items, each, weights, weight)
    return PassResult(loss, weight, g, cotangents, unstacked(items, aux), largest(bad))


class JointResult(NamedTuple):
    """The results at θ of a batch B = S + R whose hidden states went through one head.

    g_S and h̄_S are weighted as in the mean over B. g_S is without the head's own gradient.
    """

    loss: jax.Array
    weight: jax.Array
    share: jax.Array
    """That of S in the weight."""
    g_B: Params
    g_S: Params
    hbar_S: jax.Array
    bad_label: jax.Array


def joint(config: PassConfig, params: Params, S: Any, R: Any) -> JointResult | None:
    """The base pass of both parts of a batch, for the cut at the hidden states; None unless the head is linear."""
    (head_S, back_S, _), (head_R, back_R, _) = (_linearize(config, params, x, "base", checked=True) for x in (S, R))
    if not (_is_one_linear(head_S) and _is_one_linear(head_R)):
        return None
    a: Any = head_S.parts[0]
    b: Any = head_R.parts[0]
    with regions.in_jax("base backward"):
        joined = lambda name: jnp.concatenate([getattr(a, name), getattr(b, name)])
        rows: dict[str, Any] = {name: joined(name) for name in ("hidden", "labels", "token_weights")}
        whole = head_S._replace(parts=(dataclasses.replace(a, **rows, count=a.count + b.count),))
        loss, weight, _, out = heads.cotangent(config.ops, whole, config.memory, gradient=True, keep=False)
        assert out is not None
        ((hbar, *of_head),) = out
        hbar_S, hbar_R = hbar[: len(a.hidden)], hbar[len(a.hidden) :]
        g_S, g_R = back_S(((hbar_S, *map(jnp.zeros_like, of_head)),)), back_R(((hbar_R, *of_head),))
        # The factor 1 keeps XLA from adding g_S of a tied embedding to the head's product, with a copy into its layout,
        # before R's rows are scattered into that: 24m on v5e, 8 sequences, an eighth, takes 21.2 M cycles by schedule
        # and 1.73 GiB, without it 21.3 and 1.92. A barrier that runs S backward before R costs 1.3 M cycles.
        one = jax.lax.optimization_barrier(jnp.ones_like(loss))
        g_B = jax.tree.map(lambda s, r: (upcast(s) + one * upcast(r)).astype(s.dtype), g_S, g_R)
    bad = largest([heads.bad_label(head_S), heads.bad_label(head_R)])
    return JointResult(loss, weight, _shares(a.count, weight), g_B, g_S, hbar_S, bad)


def vjp(
    config: PassConfig, params: Params, items: Any, cotangents: Cotangents | None, region: str = "second"
) -> Params:
    """J(params)ᵀ z̄ with the Jacobian at these params and any cotangents; it computes no logits and no loss."""
    assert cotangents is not None

    def one(item: Any) -> Any:
        batch, zbar, share = item
        head, back, _ = _linearize(config, params, batch, region)
        with regions.in_jax(_named(region, "backward")):
            if cotangents.is_hidden:
                out = heads.hidden_vjp(head, zbar, share)
            else:
                zbar = tuple(map(_with_head, zbar, cotangents.common)) if cotangents.common else zbar
                out = heads.head_vjp(config.ops, head, zbar, share, config.memory)
            return jax.tree.map(upcast, back(out)), ()

    g = total(one, _zipped(items, cotangents.each, cotangents.share))[0]
    if cotangents.is_hidden and cotangents.common:
        # The head's own gradient, once for all micro-batches. This evaluates the model, but the compiler drops
        # everything except the path from the parameters to the head's weight.
        with regions.in_jax(_named(region, "backward")):
            _, back = jax.vjp(lambda p: _head_weights(config, p, items), params)
            like = _head_weights(config, params, items)
            (of_head,) = back(jax.tree.map(lambda x, w: x.astype(w.dtype), cotangents.common, like))
            g = jax.tree.map(lambda x, y: x + y.astype(x.dtype), g, of_head)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), g, params)


def weighted_mean(passes: list[tuple[jax.Array, Any]]) -> tuple[jax.Array, Any]:
    """The weighted mean of the trees of several (weight, tree), with the total weight."""
    if len(passes) == 1:
        return passes[0]
    weight = sum((w for w, _ in passes[1:]), passes[0][0])
    shares = [w / jnp.where(weight > 0, weight, 1) for w, _ in passes]

    def leaf(*x: jax.Array) -> jax.Array:
        scaled = [upcast(y) * s for y, s in zip(x, shares, strict=True)]
        return sum(scaled[1:], scaled[0]).astype(x[0].dtype)

    return weight, jax.tree.map(leaf, *(tree for _, tree in passes))


def add_correction(g_B: Params, g_moved: Params, g_S: Params, strength: float) -> Params:
    """ĝ = g_B + w (g'_S − g_S)."""
    leaf = lambda b, moved, s: (upcast(b) + strength * (upcast(moved) - upcast(s))).astype(b.dtype)
    with regions.in_jax("update"):
        return jax.tree.map(leaf, g_B, g_moved, g_S)


def upcast(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _is_one_linear(head: FlatHeads) -> bool:
    """Whether the loss is that of one `LinearHead`, without a factor."""
    (part, *others), (factor, *_) = head
    return isinstance(part, LinearHead) and not others and isinstance(factor, float) and factor == 1


def _named(region: str, direction: str) -> Any:
    return f"{region} {direction}"


def called(config: PassConfig, params: Params, batch: Any) -> tuple[Any, Any]:
    """(what `features` returned as its head, its aux or ()).

    Raises:
        UserError: with has_aux, if it is no pair.
    """
    found = config.features(params, split.with_own_containers(batch))
    if not config.has_aux:
        return of_batch(found, batch, is_key), ()
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UserError(f"features must return (head, aux) with has_aux=True, got {type(found).__name__}")
    return of_batch(found[0], batch, is_key), found[1]


def _checked(config: PassConfig, params: Params, batch: Any) -> jax.Array:
    leaks.check(called(config, params, batch)[0], params)
    return jnp.zeros(())


def _linearize(
    config: PassConfig, params: Params, batch: Any, region: str, *, checked: bool = False
) -> tuple[FlatHeads, Callable[[Any], Params], Any]:
    """(the head at these params, its vjp: cotangents of its `outputs` -> Jᵀ times them, aux)."""
    seen = []

    def outputs(params: Params) -> tuple[Any, Any]:
        head, aux = called(config, params, batch)
        if checked:
            leaks.check(head, params)
        seen.append(heads.flat(head))
        return heads.outputs(seen[-1]), aux

    with regions.in_jax(_named(region, "forward")):
        out, vjp_fn, aux = jax.vjp(outputs, params, has_aux=True)
    # Labels, weights and the loss do not depend on the params, so they may leave the trace of jax.vjp.
    return heads.with_outputs(seen[-1], out), lambda cotangents: vjp_fn(cotangents)[0], aux


def _head_weights(config: PassConfig, params: Params, items: Any) -> tuple[tuple[jax.Array, ...], ...]:
    """(weight[, bias]) of each part of the head, the same for every micro-batch."""
    return heads.head_weights(heads.flat(called(config, params, _first(items))[0]))


# --- micro-batches ----------------------------------------------------------------------------------------------------


class _Stack(NamedTuple):
    """Stacked micro-batches of one shape, so that `lax.scan` compiles their pass once for any number of them."""

    tree: Any


def is_key(x: Any) -> bool:
    """Whether x is a random key: a typed one, or an old-style `jax.random.PRNGKey` by its dtype and shape."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return False
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x.ndim == 0
    return dtype == jnp.uint32 and x.shape == jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def stacked(batches: list[Any]) -> Any:
    """`batches` as a `_Stack` if there are several of one shape, else unchanged.

    Outside of a trace they are unchanged too: labels are checked where their values are known.
    """
    leaves = jax.tree.leaves(batches)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if len(batches) == 1 or not traced or not all(map(meshes.is_array, leaves)):
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


def unstacked(items: Any, each: Any) -> list[Any]:
    """`each`, kept for every one of `items`, as a list."""
    if not isinstance(items, _Stack):
        return each
    return [jax.tree.map(lambda x, i=i: x[i], each) for i in range(_count(items))]


def largest(each: Any) -> jax.Array:
    """The largest of scalars: of an array, or of a list of them."""
    return reduce(jnp.maximum, each) if isinstance(each, list) else jnp.max(each)


def total(one: Callable[[Any], tuple[Any, Any]], items: Any) -> tuple[Any, Any]:
    """one(item) -> (summed, kept); returns the sum of `summed` over all items, and `kept` of each."""
    if isinstance(items, _Stack):
        first = jax.eval_shape(lambda: one(_first(items))[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def body(so_far: Any, item: Any) -> Any:
            summed, kept = one(item)
            return jax.tree.map(jnp.add, so_far, summed), kept

        return jax.lax.scan(body, zeros, items.tree)
    summed, kept = zip(*map(one, items), strict=True)
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *summed), list(kept)


def micro_batch_mean(one: Callable[[Any], tuple[Any, Any]], items: Any) -> tuple[Any, Any]:
    """As `total` for one(item) -> ((loss, weight, g), kept); loss and g become means, weighted by `weight`."""
    if isinstance(items, list) and len(items) == 1:
        summed, kept = one(items[0])
        return summed, tuple([x] for x in kept)

    def weighted(item: Any) -> Any:
        (loss, weight, g), kept = one(item)
        return (loss * weight, weight, jax.tree.map(lambda x: upcast(x) * weight, g)), kept

    (loss, weight, g), kept = total(weighted, items)
    safe = jnp.where(weight > 0, weight, 1)
    if isinstance(items, list):
        kept = tuple(map(list, zip(*kept, strict=True)))
    return (loss / safe, weight, jax.tree.map(lambda x: x / safe, g)), kept


def _count(items: Any) -> int:
    return len(jax.tree.leaves(items.tree)[0]) if isinstance(items, _Stack) else len(items)


def _is_recomputed(zbar: Any) -> bool:
    """Whether a cotangent stores its head, from which it is recomputed."""
    return getattr(zbar, "h_NxD", None) is not None


def _without_heads(zbars: tuple[Any, ...], items: Any) -> tuple[Any, ...]:
    if not isinstance(items, _Stack):
        return zbars
    bare = lambda z: dataclasses.replace(z, w_VxD=None, bias_V=None) if _is_recomputed(z) else z
    return tuple(map(bare, zbars))


def _with_head(zbar: Any, common: tuple[jax.Array, ...]) -> Any:
    if not common:
        return zbar
    return dataclasses.replace(zbar, w_VxD=common[0], bias_V=common[1] if len(common) > 1 else None)


def _shares(weights: Any, total: jax.Array) -> Any:
    return jax.tree.map(lambda w: w / jnp.where(total > 0, total, 1), weights)


def _kept(config: PassConfig, params: Params, items: Any, each: Any, weights: Any, total: jax.Array) -> Cotangents:
    # A scan would stack a copy of the head weight for each micro-batch, though it is the same for all. Instead this
    # evaluates the model once more, of which the compiler keeps only the weight.
    common: tuple[tuple[jax.Array, ...], ...] = ()
    if isinstance(items, _Stack):
        lacks = [_is_recomputed(z) for z in each]
        found = _head_weights(config, params, items) if any(lacks) else [()] * len(lacks)
        common = tuple(x if lack else () for x, lack in zip(found, lacks, strict=True))
    return Cotangents(each, _shares(weights, total), common, False)
