"""The perturbed weights in JAX: the ascent, the norm and θ + ε."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_core import regions, scopes
from fsam_core.errors import UserError
from fsam_core.jax.passes import Params, PassConfig, upcast
from fsam_core.methods import Perturbed
from fsam_core.scopes import Blocks


class Adam(NamedTuple):
    """The settings of the optimizer that receives the gradient."""

    b2: float | None
    eps: float
    clip_norm: float | None


class AscentInputs:
    """The inputs of an ascent (`ascents.AscentInputs`), as trees like the parameters."""

    def __init__(self, params: Params, opt_state: Any, gradient: Any, previous: Any, seed: int) -> None:
        self._params, self._opt_state, self._gradient, self._previous = params, opt_state, gradient, previous
        self._seed = seed

    @property
    def gradient(self) -> Params:
        if self._gradient is None:
            raise UserError("ascent: it looks at the gradient, so its source must be 'full' or 'part', not 'none'")
        return self._gradient

    @property
    def momentum(self) -> Params:
        mu = adam_state(self._opt_state).mu
        return jax.tree.map(
            lambda m, p: jnp.zeros_like(p) if _is_masked(m) else m, mu, self._params, is_leaf=_is_masked
        )

    @property
    def previous(self) -> Params:
        if self._previous is None:
            raise UserError("carry is missing: this ascent uses the last gradient; pass the one from carry_of(...)")
        return self._previous

    def random(self) -> Params:
        key = jax.random.fold_in(jax.random.key(self._seed), adam_state(self._opt_state).count)
        leaves, tree = jax.tree.flatten(self._params)
        kinds = [jnp.promote_types(x.dtype, jnp.float32) for x in leaves]
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, x.shape, kind) for k, x, kind in zip(keys, leaves, kinds, strict=True)]
        return jax.tree.unflatten(tree, drawn)

    def map(self, function: Callable[..., jax.Array], *trees: Params) -> Params:
        return jax.tree.map(function, *trees)


class StepInputs(NamedTuple):
    """The inputs of a method."""

    config: PassConfig
    method: Perturbed
    params: Params
    opt_state: Any
    previous: Any
    adam: Adam
    mask: Any
    reuses: bool
    """Whether the correction itself is stored, which needs g_B of every leaf."""
    pass_axis: str | None = None


class StepResult(NamedTuple):
    """The results of a step's passes; None for what was not evaluated."""

    loss: jax.Array
    moved_loss: jax.Array | None
    weight: jax.Array
    base_norm: jax.Array | None
    length: jax.Array
    g_hat: Params
    g_B: Params | None


def perturb(inputs: StepInputs, gradient: Any) -> tuple[Params, jax.Array]:
    """(θ + ε, ‖ε‖₂) along the method's ascent; ε = 0 if that is 0. A masked leaf is returned as the same array.

    Args:
        gradient: what the ascent may use, None for one that is known before the step.
    """
    config, method, params, opt_state = inputs.config, inputs.method, inputs.params, inputs.opt_state
    adam, mask = inputs.adam, inputs.mask
    seen = AscentInputs(params, opt_state, gradient, inputs.previous, method.seed)
    ascent = jax.tree.map(lambda a, p: a.astype(p.dtype), method.direction.of(seen), params)
    v, settings, count = None, None, 0
    if method.precondition == "adam" or callable(method.rho):
        state = adam_state(opt_state)
        count = state.count
    with regions.in_jax("norm"):
        clip = clip_factor(norm_of(ascent, mask), adam.clip_norm)
        if method.precondition == "adam":
            assert adam.b2 is not None
            ascent, v = moments(ascent, state.nu)
            current = method.second_moment == "current"
            used = count + current  # the number of gradients in the moment
            settings = config.ops.Adam(adam.b2, adam.eps, jnp.where(used > 0, 1 - adam.b2**used, 1), current)
        same = {"clip": clip, "adam": settings, "mask": mask}
        sumsq, dot = config.ops.preconditioned_norm(ascent, v, **same, per_tensor=method.norm == "per-tensor")
        rho = method.rho_at(count)
        root = lambda square: jnp.where(square == 0, 0, rho * jax.lax.rsqrt(jnp.where(square == 0, 1, square)))
        scale = jax.tree.map(root, dot if method.norm == "dual" else sumsq)
        squares = jax.tree.map(lambda k, square: upcast(jnp.square(k) * square), scale, sumsq)
        length = jnp.sqrt(sum(jax.tree.leaves(squares)))
    with regions.in_jax("perturb"):
        return config.ops.perturb(params, ascent, v, scale, **same), length


def mask_of(method: Perturbed, params: Params, blocks: Blocks | None) -> Any:
    """For each leaf, whether it is perturbed; None for all. A leaf's name is its path, joined by dots."""
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    found = scopes.mask(method.scope, names, blocks)
    return None if found is None else jax.tree.unflatten(tree, found)


def moments(g: Params, nu: Any) -> tuple[Params, Params]:
    """(g, v) for the direction; both are 0 for a parameter that Adam's mask excludes, so it is not perturbed."""
    kept = jax.tree.map(lambda v: not _is_masked(v), nu, is_leaf=_is_masked)
    structures: list[Any] = [jax.tree.structure(kept), jax.tree.structure(g)]
    if structures[0] != structures[1]:
        raise UserError("opt_state: its Adam state is not of these params; pass the one from tx.init(params)")
    pick = lambda tree: jax.tree.map(lambda keep, x, like: x if keep else jnp.zeros_like(like), kept, tree, g)
    return pick(g), pick(jax.tree.map(lambda v: 0 if _is_masked(v) else v, nu, is_leaf=_is_masked))


def adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    """The single Adam state inside an optax state, at any depth.

    Raises:
        UserError: if there is none or more than one.
    """
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    if len(found) != 1:
        got = "None" if opt_state is None else f"{len(found)} in {type(opt_state).__name__}"
        raise UserError(f"opt_state must hold one Adam state (optax.adam, adamw, scale_by_adam, …), got {got}")
    return found[0]


def norm_of(tree: Any, mask: Any = None) -> jax.Array:
    """‖·‖₂ over all leaves that are not masked, summed in float32 or float64."""
    leaves = jax.tree.leaves(tree)
    held = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
    return optax.tree.norm([upcast(x) for x, keep in zip(leaves, held, strict=True) if keep])


def clip_factor(norm: jax.Array, clip_norm: float | None) -> jax.Array:
    """The factor by which `optax.clip_by_global_norm` would multiply the gradient."""
    if clip_norm is None:
        return jnp.ones((), norm.dtype)
    return jnp.where(norm > clip_norm, clip_norm / norm, 1)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
