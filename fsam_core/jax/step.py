"""The step in JAX: `value_and_grad`, which replaces `jax.value_and_grad`. Usage: `fsam_core.jax`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fsam_core import backends, methods, regions, schedules, split
from fsam_core.errors import UserError, check_choice
from fsam_core.jax import heads, local_sync, meshes, optimizers, passes, trees
from fsam_core.jax.correction import combined, corrected
from fsam_core.jax.passes import Features, Params, PassConfig
from fsam_core.jax.perturbation import Adam, Norms, StepInputs, mask_of, norm_of
from fsam_core.jax.staged import Staged
from fsam_core.methods import Method, Perturbed, Plain
from fsam_core.schedules import ALWAYS, Kind, Schedule
from fsam_core.scopes import Blocks
from fsam_kernels.memory import AUTO, Memory

Sync = Literal["global", "local"]


class Info(NamedTuple):
    """The results of a step, each a scalar array; NaN if the method does not need it and it would cost a pass.

    Under `jax_debug_nans`, which stops at a NaN, infinity replaces it.
    """

    loss: jax.Array
    """Mean loss at θ, on the part of the batch that is evaluated there; at θ+ε if none is (sam, known ascent)."""
    perturbed_loss: jax.Array
    """Mean loss at θ+ε, on S, if the method evaluates it (sam, logit)."""
    weight: jax.Array
    """Sum of the token weights, or of the heads' counts, over all micro-batches."""
    base_norm: jax.Array
    """‖g‖₂ of the plain gradient; with a scope, for the exact method or `Staged`, only of the leaves in the scope."""
    grad_norm: jax.Array
    """‖ĝ‖₂ of the returned gradient, before clipping."""
    perturbation_norm: jax.Array
    """‖ε‖₂; 0 if nothing is perturbed."""
    perturbation_error: jax.Array
    """‖ε‖₂ relative to its length with this step's own norms, minus 1: 0 but for norm_from="previous"."""
    finite: jax.Array
    """Whether both passes were finite. If not, every returned gradient is NaN, and `skip_nonfinite` skips the step."""
    bad_label: jax.Array
    """The largest label ≥ V, which makes the loss NaN; -1 if there is none."""


class Carry(NamedTuple):
    """State between steps: trees like the parameters, or None."""

    previous: Any = None
    """What the ascent remembers: the last finite ĝ, for ascent="previous", or a memory of its own."""
    correction: Any = None
    """The last correction, for a schedule that reuses it."""
    norms: Norms | None = None
    """The last norms, for norm_from="previous": two scalars."""


def carry_of(method: Method, params: Params, schedule: Schedule = ALWAYS) -> Carry:
    """The carry before the first step.

    Raises:
        UserError: for a schedule that does not work with the method.
    """
    schedules.check(schedule, method)
    if not isinstance(method, Perturbed):
        return Carry()
    zeros = lambda wanted: jax.tree.map(jnp.zeros_like, params) if wanted else None
    kinds = [jnp.promote_types(x.dtype, jnp.float32) for x in jax.tree.leaves(trees.floats(params))]
    zero = lambda: jnp.zeros((), jnp.result_type(*kinds))  # two arrays, so that the carry can be donated
    norms = Norms(zero(), zero()) if method.norm_from == "previous" else None
    return Carry(zeros(method.direction.remembers), zeros(schedule.between == "reuse"), norms)


def value_and_grad(
    features: Features,
    method: Method,
    *,
    b2: float | None = None,
    eps: float | None = None,
    clip_norm: float | None = None,
    has_aux: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    blocks: Blocks | None = None,
    pass_axis: str | None = None,
    sync: Sync = "global",
    axis: str = "data",
    memory: Memory = AUTO,
    backend: str | None = None,
) -> Callable[..., Any]:
    """The gradient function of `method`.

    Args:
        features: (params, batch) -> `LinearHead`, `Outputs`, `Logits` or `Heads`. It is called at θ on the whole batch
            and at θ+ε on S; a `Staged` shares between the passes the part that the method's scope does not perturb.
        method: one of `Plain`, `SAM`, `FunctionalSAM`, `LogitSAM`.
        b2, eps: those of the optax Adam that receives the gradient, unless the optax state holds them
            (`optax.inject_hyperparams`). `b2` is then required with precondition="adam", or `optimizer`; eps is 1e-8.
        clip_norm: the global norm that the gradient is clipped to before the update, by the optax chain. The ascent
            direction takes it into account; the returned gradient is not clipped.
        has_aux: `features` returns (head, aux), aux any tree of arrays. The aux of the pass at θ is returned.
        optimizer: the optax optimizer that receives the gradient. The first call takes a few of its steps on one value
            for each leaf, which gives b2, and refuses an optimizer whose second moment is no mean of squares. Without
            it `optax.adamax` goes unnoticed, because its state is that of an Adam.
        blocks: the roles of the parameters, for a scope that is given by name.
        pass_axis: an axis of two devices of the current mesh. Each device runs one of the two passes of a `SAM` whose
            ascent is known before the step, at fraction 1 and a strength other than 1 (as SAMPa does).
        sync: the gradient that the ascent follows. "global": that of the whole batch, on any number of devices.
            "local": that of each data shard (m-sharpness); only the result is reduced, a mean weighted by targets, and
            `Info` has means of the shards' losses and norms.
        axis: for sync="local", the axis of the current mesh (`jax.set_mesh`) along which the batch is sharded and the
            params are replicated.
        memory: the memory budget of the head, and whether its cotangent is kept or recomputed.
        backend: "xla", "pallas" or "auto" (default: FSAM_BACKEND, then auto).

    Returns:
        grad(params, batch, opt_state=None, carry=None, kind="corrected") -> ((loss, Info), gradients like params), and
        a third value, the new carry, if one was given. With has_aux the first is (loss, Info, aux), where aux is a
        list of each micro-batch's if `batch` is `MicroBatches`.

        `params` is any tree of real arrays; an integer leaf does not move, and its gradient is 0. `batch` is whatever a
        loader gives: a list is one batch. Only `MicroBatches([...])` is several, whose gradient is that of one batch of
        them all, with equal weight for each token. With a `fraction` below 1, whole micro-batches make S, and one of
        them may be cut along the first axis of its arrays. `opt_state` is any optax state in which one Adam state holds
        each perturbed leaf; it is required with precondition="adam", for a scheduled ρ, and for some ascents. `kind` is
        the string that `Schedule.kind` returns; each kind is a separate program.

    Raises:
        UserError: for an unknown backend, b2 outside [0, 1), clip_norm ≤ 0 or an unknown sync.
    """
    methods.check_method(method)
    if b2 is not None and not 0 <= b2 < 1:
        raise UserError(f"b2 must be in [0, 1), as that of your optax.adamw; got {b2!r}")
    methods.check_clip_norm(clip_norm)
    if pass_axis is not None and not _apart(method):
        raise UserError(
            "pass_axis: two passes wait for each other but for SAM with a known ascent (previous, momentum, random), "
            f"fraction 1 and a strength other than 1; got {method!r}"
        )
    if sync not in get_args(Sync):
        raise UserError(f"sync must be global or local, got {sync!r}")
    if sync == "local" and pass_axis is not None:
        raise UserError("sync='local' and pass_axis cannot be combined; give one of the two")
    if sync == "local" and getattr(method, "norm_from", "current") == "previous":
        raise UserError("norm_from: 'previous' keeps one norm, and each shard has its own with sync='local'")
    if has_aux and (pass_axis is not None or sync == "local"):
        raise UserError("has_aux: neither pass_axis nor sync='local' runs the whole batch at θ; leave both out")
    base_config = PassConfig(backends.load("jax", backend), features, memory, has_aux)
    shown: dict[Any, Adam] = {}

    def adam_of(params: Params) -> Adam:
        """The settings of the optimizer; it is asked once."""
        if optimizer is None or not (isinstance(method, Perturbed) and method.needs_v):
            return Adam(b2, eps, clip_norm)
        tree = jax.tree.structure(params)
        if tree not in shown:
            found = optimizers.probed(optimizer, params)
            for x in found:
                if b2 is not None and x is not None and not math.isclose(x, b2, rel_tol=1e-4):
                    raise UserError(f"b2: got {b2}, and the optimizer's is {x}; leave b2 out")
            shown[tree] = Adam([b2 if x is None else x for x in found], eps, clip_norm)
        return shown[tree]

    def grad(
        params: Params, batch: Any, opt_state: Any = None, carry: Carry | None = None, *, kind: Kind = "corrected"
    ) -> Any:
        is_one = not isinstance(batch, split.MicroBatches)
        if isinstance(method, Perturbed) and kind == "corrected":
            optimizers.warn_of_accumulation(opt_state)

        def out(specs: Any) -> Any:
            params, _, _, carry = specs
            results = (meshes.WHOLE,) * (2 + has_aux)
            return (results, params) if carry is None else (results, params, carry)

        call = partial(of_micro_batches, is_one=is_one, kind=kind)
        return meshes.in_auto_mode(call, (params, split.micro_batches(batch), opt_state, carry), out)

    def of_micro_batches(
        params: Params, batches: list[Any], opt_state: Any, carry: Carry | None, *, is_one: bool, kind: Kind
    ) -> Any:
        check_choice("kind", kind, schedules.KINDS)
        before = Carry() if carry is None else carry
        if kind == "reused" and before.correction is None:
            raise UserError("kind: 'reused' needs a carry with a correction; pass the one from carry_of(...)")
        whole, config = params, _of_floats(base_config, params)
        params = trees.floats(params)
        held = lambda x: None if x is None else trees.floats(whole, x)
        before = Carry(held(before.previous), held(before.correction), before.norms)
        aux: list[Any] | None
        moved_loss: jax.Array | None
        base_norm: jax.Array | None
        correction, remembers = before.correction, isinstance(method, Perturbed) and method.direction.remembers
        error: jax.Array | None = None
        previous, norms = before.previous, before.norms
        if isinstance(method, Plain) or kind != "corrected":
            seen = passes.loss_and_grad(config, params, passes.stacked(batches))
            loss, weight, g_hat, aux, bad_label = seen.loss, seen.weight, seen.g, seen.aux, seen.bad_label
            moved_loss, length = None, jnp.zeros_like(loss)
            with regions.in_jax("norm"):
                base_norm = norm_of(g_hat)
            if kind == "reused":
                g_hat = _reused(method, g_hat, correction)
        else:
            mask = mask_of(method, params, blocks)
            reuses = correction is not None
            adam = adam_of(whole)
            inputs = StepInputs(config, method, params, opt_state, previous, adam, mask, reuses, norms, pass_axis)
            found = corrected(inputs, batches) if sync == "global" else local_sync.corrected(inputs, batches, axis)
            loss, moved_loss, weight = found.loss, found.moved_loss, found.weight
            length, error, norms, memory = found.epsilon
            previous = memory if callable(remembers) else previous
            g_hat, base_norm, aux, bad_label = found.g_hat, found.base_norm, found.aux, found.bad_label
            if reuses:
                correction = _correction(method, g_hat, found.g_B)
        with regions.in_jax("norm"):
            norm = norm_of(g_hat)
            evaluated = [x for x in (loss, moved_loss, base_norm, norm, length) if x is not None]
            finite = jnp.stack([jnp.isfinite(x) for x in evaluated]).all()
        with regions.in_jax("update"):
            g_hat = jax.tree.map(lambda x: heads.nan_unless(finite, x), g_hat)
        missing = jnp.float32(jnp.inf if jax.config.jax_debug_nans else jnp.nan)  # type: ignore[attr-defined]
        or_missing = lambda x: missing if x is None else x
        error = jnp.zeros_like(length) if error is None else error
        info = Info(loss, or_missing(moved_loss), weight, or_missing(base_norm), norm, length, error, finite, bad_label)
        results: tuple[Any, ...] = (loss, info)
        if has_aux:
            assert aux is not None
            results = (loss, info, aux[0] if is_one else aux)
        gradients = trees.gradients(whole, g_hat)
        if carry is None:
            return results, gradients

        def chosen(new: Any, old: Any) -> Any:
            return None if old is None else jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        restored = lambda tree: None if tree is None else trees.gradients(whole, tree)
        previous = restored(chosen(g_hat if remembers is True else previous, before.previous))
        after = Carry(previous, restored(chosen(correction, before.correction)), chosen(norms, before.norms))
        return results, gradients, after

    return grad


def _correction(method: Perturbed, g_hat: Params, g_B: Params) -> Params:
    """What the next steps reuse."""
    if method.reuse is not None:
        return combined(method.reuse.store, g_B, g_hat)
    with regions.in_jax("update"):
        return jax.tree.map(lambda x, g: (x - g).astype(g.dtype), g_hat, g_B)


def _reused(method: Method, g: Params, correction: Params) -> Params:
    """ĝ of a step that reuses it."""
    if isinstance(method, Perturbed) and method.reuse is not None:
        return combined(method.reuse.apply, g, correction)
    with regions.in_jax("update"):
        return jax.tree.map(lambda g, c: (g + c).astype(g.dtype), g, correction)


def _of_floats(config: PassConfig, params: Params) -> PassConfig:
    """The passes' arguments for the float leaves of `params`; the others become constants of `features`."""
    if len(jax.tree.leaves(trees.floats(params))) == len(jax.tree.leaves(params)):
        return config
    features = config.features
    if isinstance(features, Staged):
        prefix, suffix = features.prefix, features.suffix
        below = lambda p, batch: prefix(trees.joined(params, p), batch)
        return config._replace(features=Staged(below, lambda p, *x: suffix(trees.joined(params, p), *x)))
    return config._replace(features=lambda p, batch: features(trees.joined(params, p), batch))


def _apart(method: Method) -> bool:
    """Whether its two passes are independent of each other."""
    if not isinstance(method, Perturbed) or method.path != "sam":
        return False
    return method.direction.known and method.fraction == 1 and not method.exact


def mean_loss(
    features: Features, *, has_aux: bool = False, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[Params, Any], jax.Array]:
    """(params, batch) -> mean loss with the same head, for evaluation, without a gradient or an N×V array."""
    config = PassConfig(backends.load("jax", backend), features, memory, has_aux)

    def loss(params: Params, batch: Any) -> jax.Array:
        head = heads.flat(passes.called(config, params, batch)[0])
        return heads.cotangent(config.ops, head, memory, gradient=False, keep=False)[0]

    return lambda params, batch: meshes.in_auto_mode(loss, (params, batch), lambda specs: meshes.WHOLE)


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, except that a step with a non-finite gradient changes neither weights nor moments and is counted.

    It is `optax.apply_if_finite` without its limit; the count is `state.total_notfinite`.
    """
    return optax.apply_if_finite(tx, max_consecutive_errors=2**31 - 1)
