"""SAM and Functional-SAM as written without this package, in JAX: full logits, two backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from fsam_core.errors import UserError
from fsam_core.regions import in_jax as region

KINDS = ("adamw", "sam", "functional-sam")


def mean_loss(z_NxV: jax.Array, labels_N: jax.Array) -> jax.Array:
    """Cross entropy of stored logits."""
    return optax.softmax_cross_entropy_with_integer_labels(z_NxV.astype(jnp.float32), labels_N).mean()


def gradient(kind: str, logits: Callable[[Any, Any], Any], rho: float) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """(params, batch) -> (mean loss at θ, gradient), the direction of ascent is g / ‖g‖ without a preconditioner.

    Args:
        kind: "adamw" for the plain gradient, "sam" for J(θ+ε)ᵀ z̄(θ+ε), "functional-sam" for J(θ+ε)ᵀ z̄(θ), after the
            listing in arXiv 2502.02407: the vjp of the network at θ+ε, applied to the loss's gradient at the logits
            of θ.
        logits: (params, batch) -> (logits_NxV, labels_N).
        rho: length of the perturbation.

    Raises:
        UserError: for another kind.
    """
    if kind not in KINDS:
        raise UserError(f"textbook: {kind!r} is not known; use {', '.join(KINDS)}")

    def passed(which: Any, params: Any, batch: Any, zbar_NxV: jax.Array | None = None) -> Any:
        """(loss, z̄ at these params, Jᵀ z̄ of the given z̄ or of this one)."""
        with region("base forward" if which == "base" else "second forward"):
            z_NxV, vjp, labels_N = jax.vjp(lambda p: logits(p, batch), params, has_aux=True)
        with region("base backward" if which == "base" else "second backward"):
            loss, own_NxV = jax.value_and_grad(mean_loss)(z_NxV, labels_N)
            (g,) = vjp(own_NxV if zbar_NxV is None else zbar_NxV)
        return loss, own_NxV, g

    def of(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        loss, zbar_NxV, g = passed("base", params, batch)
        if kind == "adamw":
            return loss, g
        with region("norm"):
            norm = optax.tree.norm(g)
        with region("perturb"):
            moved = jax.tree.map(lambda p, x: p + rho / (norm + 1e-12) * x, params, g)
        return loss, passed("second", moved, batch, zbar_NxV if kind == "functional-sam" else None)[2]

    return of


def optimizer(learning_rate: float, b2: float, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm (0: none), decay on the matrices alone."""
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    adamw = optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def contrib(tx: optax.GradientTransformation, rho: float) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.sam` around the optimizer, as its documentation has it: an ascent of length ρ before each step."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(tx, ascent, sync_period=2, opaque_mode=True)


def contrib_step(kind: str, logits: Callable[[Any, Any], Any], tx: Any, rho: float) -> Any:
    """As `step`, with the optimizer of `contrib`."""

    def one(state: Any, batch: Any) -> Any:
        params, opt_state = state
        of = jax.value_and_grad(lambda p: mean_loss(*logits(p, batch)))
        loss, g = of(params)
        updates, opt_state = tx.update(g, opt_state, params, grad_fn=lambda p, _: of(p)[1])
        return (optax.apply_updates(params, updates), opt_state), loss

    return one


def step(kind: str, logits: Callable[[Any, Any], Any], tx: optax.GradientTransformation, rho: float) -> Any:
    """((params, opt_state), batch) -> ((params, opt_state), loss)."""
    of = gradient(kind, logits, rho)

    def one(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, g = of(params, batch)
        with region("update"):
            updates, opt_state = tx.update(g, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

    return one
