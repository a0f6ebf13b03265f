"""The inputs and results of the methods in JAX, and two operations that all of them use."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from fsam_core import regions
from fsam_core.jax.passes import Params, Run, wide
from fsam_core.jax.perturbation import Adam, Seen, perturbed
from fsam_core.methods import Perturbed


class Step(NamedTuple):
    """The inputs of a method."""

    run: Run
    method: Perturbed
    params: Params
    opt_state: Any
    previous: Any
    adam: Adam
    mask: Any
    reuses: bool
    """Whether the correction itself is stored, which needs g_B of every leaf."""
    pass_axis: str | None = None


class Outcome(NamedTuple):
    """The results of a step's passes; None for what was not evaluated."""

    loss: jax.Array
    moved_loss: jax.Array | None
    weight: jax.Array
    base_norm: jax.Array | None
    length: jax.Array
    g_hat: Params
    g_B: Params | None


def moved_weights(step: Step, gradient: Any) -> tuple[Params, jax.Array]:
    """(θ + ε, ‖ε‖₂) along the method's ascent, which may use this gradient."""
    seen = Seen(step.params, step.opt_state, gradient, step.previous, step.method.seed)
    return perturbed(step.run, step.method, step.params, seen, step.opt_state, step.adam, step.mask)


def combined(g_B: Params, g_moved: Params, g_S: Params, strength: float) -> Params:
    """ĝ = g_B + w (g'_S − g_S)."""
    leaf = lambda b, moved, s: (wide(b) + strength * (wide(moved) - wide(s))).astype(b.dtype)
    with regions.in_jax("update"):
        return jax.tree.map(leaf, g_B, g_moved, g_S)
