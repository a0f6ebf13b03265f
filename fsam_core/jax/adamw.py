"""AdamW in JAX that uses the step's `Info`: one loop a leaf for clipping, skipping, moments, decay and update.

    optimizer = AdamW(3e-4, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    opt_state = optimizer.init(params)
    (loss, info), grads = grad(params, batch, opt_state)
    params, opt_state = optimizer.step(params, grads, opt_state, info)

It equals optax.chain(clip_by_global_norm, adamw) under `skip_nonfinite`, without their extra passes: for the norm, for
the check that everything is finite, and for the choice between two states. Its state is optax's `ScaleByAdamState`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fsam_core.errors import UserError
from fsam_core.jax import trees
from fsam_core.jax.optimizers import adam_state
from fsam_core.jax.perturbation import clip_factor
from fsam_core.methods import check_clip_norm
from fsam_kernels.xla.adamw import adamw


@dataclass(frozen=True)
class AdamW:
    """The optimizer; its arithmetic is that of `fsam_kernels.xla.adamw`, whose formulas are in `fsam_kernels.spec`.

    Attributes:
        learning_rate: a number, or an optax schedule of the completed steps.
        b1, b2, eps: Adam's parameters.
        weight_decay: decoupled weight decay.
        mask: a tree of bools, or params -> such a tree: which leaves decay; None for all.
        clip_norm: the global norm that the gradient is clipped to before the update; None for no clipping.

    Raises:
        UserError: for a decay rate outside [0, 1) or clip_norm ≤ 0.
    """

    learning_rate: float | Callable[[Any], Any]
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    mask: Any = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        check_clip_norm(self.clip_norm)

    def init(self, params: Any) -> optax.ScaleByAdamState:
        """Zero moments in the dtype of the params."""
        return optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def step(self, params: Any, grads: Any, opt_state: Any, info: Any) -> tuple[Any, Any]:
        """(params, opt_state) after a step with the results of `value_and_grad`; unchanged if not `info.finite`.

        `opt_state` may be any optax state that contains one Adam state, so that a run begun with optax can be resumed.
        The rest of that state (the count of a schedule, say) is not changed, and neither are leaves of other than float
        dtypes.
        """
        state = adam_state(opt_state)
        rate = self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate
        decays = self.mask(params) if callable(self.mask) else self.mask
        held = lambda tree: trees.floats(params, tree)
        decay = self.weight_decay if decays is None else jax.tree.map(lambda on: self.weight_decay * on, held(decays))
        new = adamw(
            held(params), held(grads), held(state.mu), held(state.nu), step=state.count + 1, lr=rate, b1=self.b1,
            b2=self.b2, eps=self.eps, weight_decay=decay, clip=clip_factor(info.grad_norm, self.clip_norm),
        )  # fmt: skip
        chosen = lambda after, before: jax.tree.map(lambda x, y: jnp.where(info.finite, x, y), after, before)
        keep = lambda after, before: trees.joined(before, chosen(after, held(before)))
        count = jnp.where(info.finite, optax.safe_increment(state.count), state.count)
        mine = optax.ScaleByAdamState(count, keep(new.exp_avg, state.mu), keep(new.exp_avg_sq, state.nu))
        is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
        whole = jax.tree.map(lambda x: mine if is_adam(x) else x, opt_state, is_leaf=is_adam)
        return keep(new.theta, params), whole
