"""The methods in JAX: ĝ = g_B + w (g'_S − g_S), with only the passes that each case needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fsam_core import regions, split
from fsam_core.errors import UserError
from fsam_core.jax import passes, staged
from fsam_core.jax.passes import Params, PassResult, add_correction, upcast, weighted_mean
from fsam_core.jax.perturbation import StepInputs, StepResult, norm_of, perturb, products_of
from fsam_core.methods import Combine


def corrected(inputs: StepInputs, batches: list[Any]) -> StepResult:
    """The gradient of the method, with the losses and norms of its passes."""
    return (
        _each_micro_batch(inputs, batches) if inputs.method.direction.source == "micro" else _corrected(inputs, batches)
    )


def _corrected(inputs: StepInputs, batches: list[Any]) -> StepResult:
    config, method, params = inputs.config, inputs.method, inputs.params
    ascent, functional, exact = method.direction, method.path == "functional", method.exact
    S, others = split.split(batches, method.cut_at, jax.tree.map, passes.is_key)
    if config.has_aux and len(S) + len(others) != len(batches):
        raise UserError(
            f"has_aux: S, {method.cut_at} of the batch, cuts a batch in two, each with its own aux; give MicroBatches "
            "of which S is a whole number"
        )
    if method.form == "split":
        return _split(inputs, passes.stacked(S), passes.stacked(others))
    if staged.is_shared(inputs, S, others):
        return staged.corrected(inputs, S[0], others)
    joint = method.cut == "hidden" and ascent.source != "part" and others and len(batches) == 1
    if joint and not config.memory.row_axes:  # on a mesh the two parts' rows would move between devices
        found = _with_one_head(inputs, S[0], others[0])
        if found is not None:
            return found
    groups = [passes.stacked(x) for x in (S, others) if x]
    in_S = groups if method.fraction == 1 else groups[:1]
    if exact and ascent.known:
        return _with_known_ascent(inputs, groups)
    if inputs.pass_axis is not None:
        return _on_two_halves(inputs, groups)

    def at_theta(i: int, items: Any) -> PassResult | None:
        """The base pass of a group. The rest of an exact method needs only its cotangent, or nothing."""
        backward = i == 0 or not exact
        if not backward and not functional:
            return None
        keep = functional and i < len(in_S)
        return passes.loss_and_grad(config, at, items, backward=backward, keep=keep, cut=method.cut)

    at, seen, apart = params, [], bool(config.memory.row_axes) or len(batches) > 1
    for i, items in enumerate(groups):
        one = at_theta(i, items)
        if apart and i + 1 < len(groups) and one is not None and one.g is not None:
            # On a mesh the barrier runs the rest after S. Otherwise XLA runs both at once and holds the activations of
            # both: an eighth of 118m with the hidden cut peaks at 3.8 GiB on each of four v5e, and at 5.0 without the
            # barrier (4.3 with it on the tokens). Micro-batches keep it too. One batch on one device does better
            # without: an eighth of 24m, 8 sequences, peaks at 1.64 GiB and 22.7 M cycles, and with it at 1.84 and 23.2.
            at, g = jax.lax.optimization_barrier((params, one.g))
            one = one._replace(g=g)
        seen.append(one)
    evaluated = [x for x in seen if x is not None]
    if config.has_aux and None in seen:
        raise UserError(f"has_aux: {method!r} does not run the model at θ on the whole batch; use the full ascent")
    weight, loss = weighted_mean([(x.weight, x.loss) for x in evaluated])
    with_g = [x for x in evaluated if x.g is not None]
    # XLA recomputes the sum of the parts in each norm that reads g_B. An optimization_barrier around it was tried: a
    # 24m step on v5e, an eighth with the hidden cut, then moves 4 % fewer bytes and takes 1.6 % more cycles by schedule
    # (norms 0.2 M fewer, the base backward pass 0.5 M more, of 22).
    g_B = weighted_mean([(x.weight, x.g) for x in with_g])[1]
    g_S = g_B if len(in_S) == len(with_g) else with_g[0].g
    moved, epsilon = perturb(inputs, {"part": with_g[0].g, "none": None}.get(ascent.source, g_B))
    moved_losses: list[tuple[jax.Array, Any]] = []
    gradients: list[tuple[jax.Array, Any]] = []
    for items, base in zip(in_S, seen, strict=False):
        if functional:  # J(θ+ε)ᵀ z̄(θ)
            assert base is not None
            gradients.append((base.weight, passes.vjp(config, moved, items, base.cotangents)))
        elif method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
            there = passes.loss_and_grad(config, moved, items, region="second")
            gradients.append((there.weight, there.g))
            moved_losses.append((there.weight, there.loss))
        else:  # J(θ)ᵀ z̄(θ+ε)
            there = passes.loss_and_grad(config, moved, items, backward=False, keep=True, region="second")
            gradients.append((there.weight, passes.vjp(config, params, items, there.cotangents)))
            moved_losses.append((there.weight, there.loss))
    weight_S, g_moved = weighted_mean(gradients)
    g_hat = g_moved if exact else add_correction(g_B, g_moved, g_S, method.strength)
    if method.combine is not None:
        g_hat = combined(method.combine, g_B, g_moved)
    with regions.in_jax("norm"):
        base_norm = norm_of(g_B, inputs.mask if exact else None)
    moved_loss = weighted_mean(moved_losses)[1] if moved_losses else None
    weight = weight if None not in seen else weight_S
    bad, aux = passes.largest([x.bad_label for x in evaluated]), [a for x in evaluated for a in x.aux]
    return StepResult(loss, moved_loss, weight, base_norm, epsilon, g_hat, g_B, bad, aux)


def _with_one_head(inputs: StepInputs, S: Any, R: Any) -> StepResult | None:
    """The correction on a part S of one batch with the cut at the hidden states; None unless the head is linear.

    S and R go through the model apart, because g_S is needed, and through the head together.
    """
    config, method, params = inputs.config, inputs.method, inputs.params
    base = passes.joint(config, params, S, R)
    if base is None:
        return None
    moved, epsilon = perturb(inputs, None if method.direction.known else base.g_B)
    # The head's own gradient is the same in g_S and g'_S, and in neither here.
    scale = jnp.where(base.share > 0, method.strength / jnp.where(base.share > 0, base.share, 1), 0)
    with regions.in_jax("update"):
        # Before the second pass: XLA writes it in the loop of the norm, and the second pass adds to it in place.
        onto = jax.tree.map(lambda b, s: upcast(b) - scale * upcast(s), base.g_B, base.g_S)
    g_moved = passes.vjp(config, moved, [S], passes.Cotangents([(base.hbar_S,)], [scale], (), is_hidden=True))
    with regions.in_jax("update"):
        g_hat = jax.tree.map(lambda x, y: (x + upcast(y)).astype(y.dtype), onto, g_moved)
    with regions.in_jax("norm"):
        base_norm = norm_of(base.g_B)
    return StepResult(base.loss, None, base.weight, base_norm, epsilon, g_hat, base.g_B, base.bad_label, [])


def combined(combine: Combine, g: Params, g_moved: Params) -> Params:
    """α g + β g'."""
    with regions.in_jax("norm"):
        alpha, beta = combine(products_of(g, g), products_of(g, g_moved), products_of(g_moved, g_moved))
    with regions.in_jax("update"):
        return jax.tree.map(lambda x, y: (alpha * upcast(x) + beta * upcast(y)).astype(x.dtype), g, g_moved)


def _split(inputs: StepInputs, S: Any, R: Any) -> StepResult:
    """ĝ = (|R| g_R + |S| g'_S) / |B|: the rest is passed at θ, and S at θ+ε."""
    config, method, params = inputs.config, inputs.method, inputs.params
    functional = method.path == "functional"
    if config.has_aux and not functional:
        raise UserError(f"has_aux: {method!r} does not run the model at θ on the whole batch; use form='correction'")
    rest = passes.loss_and_grad(config, params, R)
    evaluated = [rest]
    if functional:
        evaluated.insert(0, passes.loss_and_grad(config, params, S, backward=False, keep=True, cut=method.cut))
    moved, epsilon = perturb(inputs, None if method.direction.known else rest.g)
    moved_loss = None
    if functional:
        weight_S, g_moved, bad = evaluated[0].weight, passes.vjp(config, moved, S, evaluated[0].cotangents), []
    else:
        there = passes.loss_and_grad(config, moved, S, region="second")
        weight_S, g_moved, moved_loss, bad = there.weight, there.g, there.loss, [there.bad_label]
    with regions.in_jax("update"):
        weight, g_hat = weighted_mean([(rest.weight, rest.g), (weight_S, g_moved)])
    loss = weighted_mean([(x.weight, x.loss) for x in evaluated])[1]
    base_norm = None
    if not method.direction.known:
        with regions.in_jax("norm"):
            base_norm = norm_of(rest.g)
    bad_label, aux = passes.largest([*bad, *(x.bad_label for x in evaluated)]), [a for x in evaluated for a in x.aux]
    return StepResult(loss, moved_loss, weight, base_norm, epsilon, g_hat, None, bad_label, aux)


def _with_known_ascent(inputs: StepInputs, groups: list[Any]) -> StepResult:
    """The exact method along an ascent known before the step, which needs no gradient at θ."""
    config, method, params = inputs.config, inputs.method, inputs.params
    (items,) = groups
    functional = method.path == "functional"
    if config.has_aux and not functional:
        raise UserError(f"has_aux: {method!r} does not run the model at θ; use the full ascent")
    moved, epsilon = perturb(inputs, None)
    if method.path == "sam":
        there = passes.loss_and_grad(config, moved, items)
        return StepResult(there.loss, there.loss, there.weight, None, epsilon, there.g, None, there.bad_label)
    at, back = (params, moved) if functional else (moved, params)
    seen = passes.loss_and_grad(config, at, items, backward=False, keep=True, cut=method.cut)
    g_hat = passes.vjp(config, back, items, seen.cotangents)
    moved_loss = None if functional else seen.loss
    return StepResult(seen.loss, moved_loss, seen.weight, None, epsilon, g_hat, None, seen.bad_label, seen.aux)


def _on_two_halves(inputs: StepInputs, groups: list[Any]) -> StepResult:
    """Two independent passes, each on one half of the devices along an axis of the mesh.

    Both halves run the same program, at θ or at θ+ε; a psum over the axis gives (1 − w) g + w g'.
    """
    config, method, params, axis = inputs.config, inputs.method, inputs.params, inputs.pass_axis
    assert axis is not None
    (items,) = groups
    moved, epsilon = perturb(inputs, None)

    def mine(params: Params, moved: Params, items: Any) -> Any:
        second = jax.lax.axis_index(axis) == 1
        here = jax.tree.map(lambda p, q: jnp.where(second, q, p), params, moved)
        seen = passes.loss_and_grad(config, here, items)
        of = lambda x, share: jax.lax.psum(jnp.where(second, share[1], share[0]) * x, axis)
        g_hat = jax.tree.map(lambda g: of(upcast(g), (1 - method.strength, method.strength)).astype(g.dtype), seen.g)
        base_norm = of(norm_of(seen.g), (1.0, 0.0))
        bad = jax.lax.pmax(seen.bad_label, axis)
        return of(seen.loss, (1.0, 0.0)), of(seen.loss, (0.0, 1.0)), of(seen.weight, (1.0, 0.0)), base_norm, g_hat, bad

    whole = jax.sharding.PartitionSpec()
    # check_vma is off because nothing inside says that the batch is the same on both halves.
    halves = jax.shard_map(mine, in_specs=whole, out_specs=whole, axis_names={axis}, check_vma=False)
    loss, moved_loss, weight, base_norm, g_hat, bad = halves(params, moved, items)
    return StepResult(loss, moved_loss, weight, base_norm, epsilon, g_hat, None, bad)


def _each_micro_batch(inputs: StepInputs, batches: list[Any]) -> StepResult:
    """The correction of each micro-batch along its own gradient; the results are weighted means."""
    names = ("moved_loss", "base_norm", "epsilon", "g_hat", "g_B")

    def one(batch: Any) -> Any:
        found = _corrected(inputs, [batch])
        means = {name: getattr(found, name) for name in names}
        return (found.loss, found.weight, means), (found.bad_label, (found.aux or [()])[0])

    items = passes.stacked(batches)
    (loss, weight, means), (bad, aux) = passes.micro_batch_mean(one, items)
    for name in ("g_hat", "g_B") if means["g_B"] is not None else ("g_hat",):
        means[name] = jax.tree.map(lambda x, p: x.astype(p.dtype), means[name], inputs.params)
    bad_label, each_aux = passes.largest(bad), passes.unstacked(items, aux)
    return StepResult(loss=loss, weight=weight, bad_label=bad_label, aux=each_aux, **means)
