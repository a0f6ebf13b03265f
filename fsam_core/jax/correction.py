"""The methods in JAX: ĝ = g_B + w (g'_S − g_S), with only the passes that each case needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_core import regions, split
from fsam_core.jax import passes, staged
from fsam_core.jax.passes import Params, Passed, merged, wide
from fsam_core.jax.perturbation import norm_of
from fsam_core.jax.step_types import Outcome, Step, combined, moved_weights


def corrected(step: Step, batches: list[Any]) -> Outcome:
    """The gradient of the method, with the losses and norms of its passes."""
    return _micro(step, batches) if step.method.direction.source == "micro" else _corrected(step, batches)


def _corrected(step: Step, batches: list[Any]) -> Outcome:
    run, method, params = step.run, step.method, step.params
    ascent, functional, exact = method.direction, method.path == "functional", method.exact
    share = method.share if ascent.source == "part" else method.fraction
    S, others = split.split(batches, share, passes.flatten)
    if staged.is_shared(step, S, others):
        return staged.corrected(step, S[0], others)
    groups = [passes.stacked(x) for x in (S, others) if x]
    in_S = groups if method.fraction == 1 else groups[:1]
    if exact and ascent.known:
        return _known(step, groups)
    if step.pass_axis is not None:
        return _apart(step, groups)

    def at_theta(i: int, items: Any) -> Passed | None:
        """The base pass of a group. The rest of an exact method needs only its cotangent, or nothing."""
        backward = i == 0 or not exact
        if not backward and not functional:
            return None
        keep = functional and i < len(in_S)
        return passes.base(run, at, items, backward=backward, keep=keep, cut=method.cut)

    at, seen = params, []
    for i, items in enumerate(groups):
        one = at_theta(i, items)
        if i + 1 < len(groups) and one is not None and one.g is not None:
            # The barrier runs the rest after S. Otherwise XLA runs both at once and holds the activations of both. By
            # the TPU's compiler, an eighth of 118m with the hidden cut peaks at 3.8 GiB on each of four v5e, and at 5.0
            # without the barrier. It costs copies of weights: 24m on one v5e, 8 sequences, takes 1.9 % more cycles.
            # With the barrier on the tokens instead of the weights it is 0.8 %, but the peak is 4.3 GiB, and at 24m
            # 1.91 instead of 1.86.
            at, g = jax.lax.optimization_barrier((params, one.g))
            one = one._replace(g=g)
        seen.append(one)
    evaluated = [x for x in seen if x is not None]
    weight, loss = merged([(x.weight, x.loss) for x in evaluated])
    with_g = [x for x in evaluated if x.g is not None]
    # XLA recomputes the sum of the parts in each norm that reads g_B. An optimization_barrier around it was tried: a
    # 24m step on v5e, an eighth with the hidden cut, then moves 4 % fewer bytes and takes 1.6 % more cycles by schedule
    # (norms 0.2 M fewer, the base backward pass 0.5 M more, of 22).
    g_B = merged([(x.weight, x.g) for x in with_g])[1]
    g_S = g_B if len(in_S) == len(with_g) else with_g[0].g
    moved, length = moved_weights(step, {"part": with_g[0].g, "none": None}.get(ascent.source, g_B))
    moved_losses: list[tuple[jax.Array, Any]] = []
    gradients: list[tuple[jax.Array, Any]] = []
    for items, base in zip(in_S, seen, strict=False):
        if functional:  # J(θ+ε)ᵀ z̄(θ)
            assert base is not None
            gradients.append((base.weight, passes.pull_back(run, moved, items, base.cotangents)))
        elif method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
            there = passes.base(run, moved, items, region="second")
            gradients.append((there.weight, there.g))
            moved_losses.append((there.weight, there.loss))
        else:  # J(θ)ᵀ z̄(θ+ε)
            there = passes.base(run, moved, items, backward=False, keep=True, region="second")
            gradients.append((there.weight, passes.pull_back(run, params, items, there.cotangents)))
            moved_losses.append((there.weight, there.loss))
    weight_S, g_moved = merged(gradients)
    g_hat = g_moved if exact else combined(g_B, g_moved, g_S, method.strength)
    with regions.in_jax("norm"):
        base_norm = norm_of(g_B, step.mask if exact else None)
    moved_loss = merged(moved_losses)[1] if moved_losses else None
    return Outcome(loss, moved_loss, weight if None not in seen else weight_S, base_norm, length, g_hat, g_B)


def _known(step: Step, groups: list[Any]) -> Outcome:
    """The exact method along an ascent known before the step, which needs no gradient at θ."""
    run, method, params = step.run, step.method, step.params
    (items,) = groups
    moved, length = moved_weights(step, None)
    if method.path == "sam":
        there = passes.base(run, moved, items)
        return Outcome(there.loss, there.loss, there.weight, None, length, there.g, None)
    functional = method.path == "functional"
    at, back = (params, moved) if functional else (moved, params)
    seen = passes.base(run, at, items, backward=False, keep=True, cut=method.cut)
    g_hat = passes.pull_back(run, back, items, seen.cotangents)
    return Outcome(seen.loss, None if functional else seen.loss, seen.weight, None, length, g_hat, None)


def _apart(step: Step, groups: list[Any]) -> Outcome:
    """Two independent passes, each on one half of the devices along an axis of the mesh.

    Both halves run the same program, at θ or at θ+ε; a psum over the axis gives (1 − w) g + w g'.
    """
    run, method, params, axis = step.run, step.method, step.params, step.pass_axis
    assert axis is not None
    (items,) = groups
    moved, length = moved_weights(step, None)

    def mine(params: Params, moved: Params, items: Any) -> Any:
        second = jax.lax.axis_index(axis) == 1
        here = jax.tree.map(lambda p, q: jnp.where(second, q, p), params, moved)
        seen = passes.base(run, here, items)
        of = lambda x, share: jax.lax.psum(jnp.where(second, share[1], share[0]) * x, axis)
        g_hat = jax.tree.map(lambda g: of(wide(g), (1 - method.strength, method.strength)).astype(g.dtype), seen.g)
        base_norm = of(norm_of(seen.g), (1.0, 0.0))
        return of(seen.loss, (1.0, 0.0)), of(seen.loss, (0.0, 1.0)), of(seen.weight, (1.0, 0.0)), base_norm, g_hat

    whole = jax.sharding.PartitionSpec()
    # check_vma is off because nothing inside says that the batch is the same on both halves.
    halves = jax.shard_map(mine, in_specs=whole, out_specs=whole, axis_names={axis}, check_vma=False)
    loss, moved_loss, weight, base_norm, g_hat = halves(params, moved, items)
    return Outcome(loss, moved_loss, weight, base_norm, length, g_hat, None)


def _micro(step: Step, batches: list[Any]) -> Outcome:
    """The correction of each micro-batch along its own gradient; the results are weighted means."""
    names = ("moved_loss", "base_norm", "length", "g_hat", "g_B")

    def one(batch: Any) -> Any:
        found = _corrected(step, [batch])
        return (found.loss, found.weight, {name: getattr(found, name) for name in names}), ()

    (loss, weight, means), _ = passes.mean(one, passes.stacked(batches))
    for name in ("g_hat", "g_B") if means["g_B"] is not None else ("g_hat",):
        means[name] = jax.tree.map(lambda x, p: x.astype(p.dtype), means[name], step.params)
    return Outcome(loss=loss, weight=weight, **means)
