"""The Adam moments inside an optax state, wherever its wrappers put them."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_core.errors import UserError
from fsam_core.jax import trees

KINDS = "optax.adam, adamw, scale_by_adam, …"
PROBE = 1e-12
"""A gradient that no clipping changes, that by a leaf's own norm included: of a weight of 0 it is 1e-5."""


class AdamState(NamedTuple):
    """One Adam state, and b2 and eps of its optimizer if the optax state holds them (`optax.inject_hyperparams`)."""

    state: optax.ScaleByAdamState
    b2: Any = None
    eps: Any = None


class Moments(NamedTuple):
    """The moments of each leaf: trees like the params, 0 for a leaf that no Adam state holds."""

    states: list[AdamState]
    owners: list[int | None]
    """For each leaf, the index of the state that holds it."""
    mu: Any
    nu: Any

    def mask_of(self, index: int, mask: Any) -> Any:
        """For each leaf, whether it is perturbed with the settings of that state; None for all."""
        if len(self.states) == 1:
            return mask
        moves = [True] * len(self.owners) if mask is None else jax.tree.leaves(mask)
        own = [owner == index and move for owner, move in zip(self.owners, moves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self.nu), own)


def adam_states(opt_state: Any) -> list[AdamState]:
    """The Adam states inside an optax state, at any depth.

    Raises:
        UserError: if there is none.
    """
    found = _find(opt_state, {})
    if not found:
        got = "None" if opt_state is None else f"none in {type(opt_state).__name__}"
        raise UserError(f"opt_state must hold an Adam state ({KINDS}), got {got}")
    return found


def adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    """The single Adam state inside an optax state, at any depth.

    Raises:
        UserError: if there is none or more than one.
    """
    found = adam_states(opt_state)
    if len(found) > 1:
        raise UserError(f"opt_state must hold one Adam state ({KINDS}), got {len(found)} in {type(opt_state).__name__}")
    return found[0].state


def moments(opt_state: Any, params: Any, mask: Any, purpose: str) -> Moments:
    """The moments that each leaf has in the one Adam state that holds it.

    Args:
        mask: for each leaf, whether it is perturbed, and therefore needs moments; None for all.
        purpose: the argument that needs them, for the error.

    Raises:
        UserError: for a leaf in several Adam states, a perturbed one in none, or moments of other shapes.
    """
    states = adam_states(opt_state)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    held = [[dict(_by_path(x.state.mu)), dict(_by_path(x.state.nu))] for x in states]
    keys = [jax.tree_util.keystr(path) for path, _ in leaves]
    known = [key for _, second in held for key in second]
    if known and set(known).isdisjoint(keys):
        raise UserError(
            f"opt_state: its Adam state is not of these params: it holds {known[0] or 'one array for all'}, and they "
            f"{keys[0]}; pass the one from tx.init(params), and no optax.flatten"
        )
    moves = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
    owners: list[int | None] = []
    mu, nu = [], []
    for name, key, (_, p), move in zip(trees.names(params), keys, leaves, moves, strict=True):
        own = [i for i, (_, second) in enumerate(held) if key in second]
        if len(own) > 1:
            raise UserError(
                f"opt_state: {len(own)} Adam states hold {name}; each leaf must be in one, as with optax.partition"
            )
        if not own and move:
            raise UserError(
                f"opt_state: no Adam state holds {name}, which {purpose} needs; leave it out of the perturbation with "
                "scope=, or use precondition=None"
            )
        owners.append(own[0] if own else None)
        m, v = (x[key] for x in held[own[0]]) if own else (jnp.zeros_like(p),) * 2
        if jnp.shape(v) != jnp.shape(p):
            raise UserError(
                f"opt_state: its Adam state is not of these params, {name} is {list(jnp.shape(v))} there and "
                f"{list(jnp.shape(p))} here; pass the one from tx.init(params)"
            )
        mu.append(m)
        nu.append(v)
    return Moments(states, owners, jax.tree.unflatten(tree, mu), jax.tree.unflatten(tree, nu))


def b2_and_eps(found: AdamState, b2: float | None, eps: float | None) -> tuple[Any, Any]:
    """Those of an Adam state: the ones it holds, or else the ones that `value_and_grad` was given; eps or else optax's.

    Raises:
        UserError: without a b2, or where one that is held and known differs from the one given.
    """
    b2 = _agreed("b2", found.b2, b2, 1e-5)
    eps = _agreed("eps", found.eps, eps, 1e-2)  # optax may hold it in bfloat16, as the params
    if b2 is None:
        raise UserError(
            "b2 is missing: precondition='adam' needs the b2 of your optax.adamw, which its state does not hold; "
            "give value_and_grad b2=0.95, say"
        )
    return b2, 1e-8 if eps is None else eps


def _agreed(name: str, held: Any, given: float | None, tolerance: float) -> Any:
    if held is None or isinstance(held, jax.core.Tracer):
        return given if held is None else held
    if given is not None and not math.isclose(float(held), given, rel_tol=tolerance):
        raise UserError(
            f"{name}: got {given}, and opt_state holds {float(held):.6g}; leave {name} out, or make them equal"
        )
    return float(held) if given is None else given


def probed(tx: optax.GradientTransformation, params: Any) -> list[float | None]:
    """The b2 of each of `adam_states`, which the optimizer shows in a few steps on one value a leaf.

    None for a state that does not change in a step (`optax.MultiSteps`), or that holds no leaf.

    Raises:
        UserError: for a second moment that is no mean of squares, as that of `optax.adamax`, and for an optimizer whose
            update needs more than a gradient.
    """

    def after(g: float, opt_state: Any) -> tuple[Any, list[float]]:
        opt_state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, g), small), opt_state, small)[1]
        held = [jax.tree.leaves(x.state.nu) for x in adam_states(opt_state)]
        return opt_state, [float(x[0].sum()) if x else 0.0 for x in held]

    with jax.ensure_compile_time_eval():  # also under jit
        small = jax.tree.map(lambda p: jnp.zeros((1,) * jnp.ndim(p), jnp.float32), params)
        try:
            before, once = after(PROBE, tx.init(small))
            twice = after(2 * PROBE, tx.init(small))[1]
            later = after(0.0, before)[1]
        except TypeError as error:
            raise UserError(f"optimizer: it cannot be tried on gradients alone ({error}); give b2 instead") from error
    if not all(math.isclose(4 * v, v2, rel_tol=1e-2) for v, v2 in zip(once, twice, strict=True)):
        raise UserError(
            "optimizer: the second moment in its Adam state is no mean of squares. optax.adamax has a maximum there: "
            "use optax.adam or adamw, or precondition=None. Where noise or a normalisation comes before Adam, give b2"
        )
    return [float(f"{v2 / v:.5g}") if v else None for v, v2 in zip(once, later, strict=True)]


def warn_of_accumulation(opt_state: Any) -> None:
    """Warn if optax accumulates gradients, since each call then sees one micro-batch."""
    is_multi = lambda x: isinstance(x, optax.MultiStepsState)
    if any(map(is_multi, jax.tree.leaves(opt_state, is_leaf=is_multi))):
        warnings.warn(
            "opt_state: under optax.MultiSteps each call of the gradient function sees one micro-batch and follows its "
            "ascent; give it MicroBatches([...]) of a whole step to follow the ascent of them all",
            stacklevel=3,
        )


def _find(opt_state: Any, held: dict[str, Any]) -> list[AdamState]:
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    is_injected = lambda x: hasattr(x, "hyperparams") and hasattr(x, "inner_state")
    found = []
    for x in jax.tree.leaves(opt_state, is_leaf=lambda x: is_adam(x) or is_injected(x)):
        if is_adam(x):
            found.append(AdamState(x, held.get("b2"), held.get("eps")))
        elif is_injected(x):
            found += _find(x.inner_state, {**held, **x.hyperparams})
    return found


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    """The leaves by path. A leaf that optax masks from this state has none: `MaskedNode` is an empty tree."""
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
