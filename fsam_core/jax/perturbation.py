"""The perturbed weights in JAX: the ascent, the norm and θ + ε."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_core import regions, scopes
from fsam_core.errors import UserError
from fsam_core.jax import optimizers, trees
from fsam_core.jax.passes import Params, PassConfig, upcast
from fsam_core.methods import Perturbed
from fsam_core.scopes import Blocks
from fsam_kernels.xla.direction import second_moment


class Adam(NamedTuple):
    """The settings of the optimizer that receives the gradient."""

    b2: Sequence[float | None] | float | None
    """One for all Adam states, or one for each."""
    eps: float | None
    clip_norm: float | None


class AscentInputs:
    """The inputs of an ascent (`ascents.AscentInputs`), as trees like the parameters."""

    def __init__(self, inputs: StepInputs, gradient: Any) -> None:
        self._inputs, self._gradient = inputs, gradient

    @property
    def gradient(self) -> Params:
        if self._gradient is None:
            raise UserError("ascent: it looks at the gradient, so its source must be 'full' or 'part', not 'none'")
        return self._gradient

    @property
    def momentum(self) -> Params:
        inputs = self._inputs
        return optimizers.moments(inputs.opt_state, inputs.params, inputs.mask, "the ascent").mu

    @property
    def weights(self) -> Params:
        return self._inputs.params

    @property
    def previous(self) -> Params:
        if self._inputs.previous is None:
            raise UserError("carry is missing: this ascent remembers the last step; pass the one from carry_of(...)")
        return self._inputs.previous

    @property
    def memory(self) -> Params:
        remembers = self._inputs.method.direction.remembers
        if not callable(remembers):
            raise UserError("ascent: it has no memory of its own; give it one as `remembers`")
        return remembers(self)

    def random(self) -> Params:
        key = jax.random.fold_in(jax.random.key(self._inputs.method.seed), steps_of(self._inputs.opt_state))
        leaves, tree = jax.tree.flatten(self._inputs.params)
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
    norms: Norms | None = None
    """Those of the last step, for norm_from="previous"."""
    pass_axis: str | None = None


class Norms(NamedTuple):
    """Norms of a step that the next one may use; 0 before the first."""

    ascent: jax.Array
    """‖a‖, from which the clipping factor c follows."""
    direction: jax.Array
    """What ε is divided by, ‖d‖₂ or sqrt((c a)ᵀ d), over c."""


class Perturbation(NamedTuple):
    """What is known of a perturbation besides θ + ε."""

    length: jax.Array
    """‖ε‖₂"""
    error: jax.Array | None = None
    """‖ε‖₂ relative to that with this step's own norms, minus 1, for norm_from="previous"."""
    norms: Norms | None = None
    """Of this step, for norm_from="previous"."""
    memory: Params | None = None
    """Of an ascent with a memory of its own."""


class StepResult(NamedTuple):
    """The results of a step's passes; None for what was not evaluated."""

    loss: jax.Array
    moved_loss: jax.Array | None
    weight: jax.Array
    base_norm: jax.Array | None
    epsilon: Perturbation
    g_hat: Params
    g_B: Params | None
    bad_label: jax.Array
    aux: list[Any] | None = None
    """What `features` returned besides the head, for each micro-batch; None where θ is not evaluated."""


def perturb(inputs: StepInputs, gradient: Any) -> tuple[Params, Perturbation]:
    """θ + ε along the method's ascent; ε = 0 if that is 0. A masked leaf is returned as the same array.

    Args:
        gradient: what the ascent may use, None for one that is known before the step.
    """
    ops, method, params, adam, mask = inputs.config.ops, inputs.method, inputs.params, inputs.adam, inputs.mask
    seen, last = AscentInputs(inputs, gradient), _last_norms(inputs)
    like = lambda tree: jax.tree.map(lambda a, p: a.astype(p.dtype), tree, params)
    ascent = like(method.direction.of(seen))
    memory = like(seen.memory) if callable(method.direction.remembers) else None
    v, groups = None, [(None, mask)]
    if method.needs_v:
        purpose = "the v of your preconditioner" if method.direction_of else "precondition='adam'"
        held = optimizers.moments(inputs.opt_state, params, mask, purpose)
        v = held.nu
        groups = [(_settings(inputs, held, i), held.mask_of(i, mask)) for i in range(len(held.states))]
    with regions.in_jax("norm"):
        norm = norm_of(ascent, mask)
        clip = used = clip_factor(last.ascent if last else norm, None if method.norm == "none" else adam.clip_norm)
        if method.direction_of is not None:
            scaled = jax.tree.map(lambda a: (a * clip).astype(a.dtype), ascent)
            v_hat = scaled if v is None else _v_hat(scaled, v, groups)
            ascent, clip = jax.tree.map(method.direction_of, params, scaled, v_hat), jnp.ones_like(clip)
            v, groups = None, [(None, mask)]
        # Where d is linear in c, its norm does not wait for c: both norms are then sums of one loop over the gradient.
        linear = v is None or method.second_moment == "previous"
        sums = [
            ops.preconditioned_norm(
                ascent, v, clip=1.0 if linear else clip, adam=x, mask=own, per_tensor=method.norm == "per-tensor"
            )
            for x, own in groups
        ]
        sumsq, dot = sums[0] if len(sums) == 1 else jax.tree.map(lambda *x: sum(x[1:], x[0]), *sums)
        if linear:
            sumsq, dot = jax.tree.map(lambda x: jnp.square(clip) * x, (sumsq, dot))
        if method.direction_of is not None and method.norm == "dual":
            dot = products_of(scaled, ascent, mask)
        rho = method.rho_at(steps_of(inputs.opt_state) if callable(method.rho) else 0)
        root = lambda square: jnp.where(square == 0, 0, rho * jax.lax.rsqrt(jnp.where(square == 0, 1, square)))
        square = {"dual": dot, "none": jax.tree.map(jnp.ones_like, sumsq)}.get(method.norm, sumsq)
        norms = error = None
        if last is None:
            scale = jax.tree.map(root, square)
        else:
            norms = Norms(norm, (jnp.sqrt(square) / used).astype(last.direction.dtype))
            divisor = used * last.direction
            scale = root(jnp.square(divisor))
            error = jnp.where(divisor == 0, 0, jnp.sqrt(square) / jnp.where(divisor == 0, 1, divisor)) - 1
        squares = jax.tree.map(lambda k, square: upcast(jnp.square(k) * square), scale, sumsq)
        length = jnp.sqrt(sum(jax.tree.leaves(squares)))
    with regions.in_jax("perturb"):
        moved = params
        for x, own in groups:
            moved = ops.perturb(moved, ascent, v, scale, clip=clip, adam=x, mask=own)
        return moved, Perturbation(length, error, norms, memory)


def _last_norms(inputs: StepInputs) -> Norms | None:
    """The last step's norms, if ε takes them."""
    if inputs.method.norm_from == "current":
        return None
    if inputs.norms is None:
        raise UserError("carry is missing: norm_from='previous' uses the last norms; pass the one from carry_of(...)")
    return inputs.norms


def _v_hat(a: Params, v: Params, groups: Sequence[tuple[Any, Any]]) -> Params:
    """The bias-corrected second moment of each leaf, by the settings of the Adam state that holds it."""
    leaves, tree = jax.tree.flatten(a)
    found = list(leaves)  # a masked leaf does not move
    for x, mask in groups:
        held = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
        for i, (g, nu, own) in enumerate(zip(leaves, jax.tree.leaves(v), held, strict=True)):
            if own:
                g = upcast(g)
                found[i] = second_moment(g, nu.astype(g.dtype), x)
    return jax.tree.unflatten(tree, found)


def _settings(inputs: StepInputs, held: optimizers.Moments, index: int) -> Any:
    """The backend's settings of the direction, for the leaves that an Adam state holds."""
    adam, found, current = inputs.adam, held.states[index], inputs.method.second_moment == "current"
    b2 = adam.b2[index] if isinstance(adam.b2, Sequence) else adam.b2
    b2, eps = optimizers.b2_and_eps(found, b2, adam.eps)
    used = found.state.count + current  # the number of gradients in the moment
    with regions.in_jax("norm"):
        return inputs.config.ops.Adam(b2, eps, jnp.where(used > 0, 1 - b2**used, 1), current)


def steps_of(opt_state: Any) -> Any:
    """The number of completed steps, by the first Adam state."""
    return optimizers.adam_states(opt_state)[0].state.count


def mask_of(method: Perturbed, params: Params, blocks: Blocks | None) -> Any:
    """For each leaf, whether it is perturbed; None for all. A leaf's name is that of `trees.names`."""
    found = scopes.mask(method.scope, trees.names(params), blocks)
    return None if found is None else jax.tree.unflatten(jax.tree.structure(params), found)


def norm_of(tree: Any, mask: Any = None) -> jax.Array:
    """‖·‖₂ over all leaves that are not masked, summed in float32 or float64."""
    leaves = jax.tree.leaves(tree)
    held = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
    return optax.tree.norm([upcast(x) for x, keep in zip(leaves, held, strict=True) if keep])


def products_of(x: Any, y: Any, mask: Any = None) -> jax.Array:
    """xᵀ y over all leaves that are not masked."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    held = [True] * len(pairs) if mask is None else jax.tree.leaves(mask)
    return jnp.stack([jnp.vdot(upcast(a), upcast(b)) for (a, b), keep in zip(pairs, held, strict=True) if keep]).sum()


def clip_factor(norm: jax.Array, clip_norm: float | None) -> jax.Array:
    """The factor by which `optax.clip_by_global_norm` would multiply the gradient."""
    if clip_norm is None:
        return jnp.ones((), norm.dtype)
    return jnp.where(norm > clip_norm, clip_norm / norm, 1)
