"""Whole training steps for `compiler.compile_for`: the trainers' decoder, `fsam_core.jax` and optax, by shape alone.

The peers are steps as written without this package: two backward passes and stored logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fsam_core.schedules import Kind
from fsam_core.split import MicroBatches
from fsam_profiling.settings import step_settings
from fsam_profiling.timing import textbook_jax
from fsam_trainers.config import Settings
from fsam_trainers.jax import engine
from fsam_trainers.models import module_of
from fsam_trainers.models.flax_decoder import nested
from fsam_trainers.models.layout import ModelConfig, shapes
from fsam_trainers.models.vit_layout import ViTConfig

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def step(*, preset: str, method: str, **of_settings: Any) -> Program:
    """`of` with `settings` as JSON can hold them."""
    return of(step_settings(preset, method, **of_settings))


def of(chosen: Settings, kind: Kind = "corrected") -> Program:
    """(state, micro-batches) -> (state, info): one optimizer step of a kind, as the JAX trainer compiles it."""
    step = engine.step_of(chosen)
    state = jax.eval_shape(partial(engine.state_of, chosen), weights_of(chosen.model))
    return partial(step, kind=kind), (state, batches_of(chosen))


def textbook(*, preset: str, kind: str, **of_settings: Any) -> Program:
    """The textbook's step ("adamw", "sam" or "functional-sam") with `settings` as JSON can hold them."""
    return peer(step_settings(preset, "adamw", **of_settings), "textbook", kind)


def peer(chosen: Settings, whose: str, kind: str) -> Program:
    """The step of "textbook" or "optax.contrib" with these settings; of one micro-batch."""
    tx = optimizer_of(chosen, whose)
    make = textbook_jax.step if whose == "textbook" else textbook_jax.contrib_step
    step = make(kind, _logits(chosen), tx, chosen.rho)

    def function(state: Any, batches: MicroBatches) -> Any:
        (batch,) = batches
        return step(state, batch)

    params = weights_of(chosen.model)
    return function, ((params, jax.eval_shape(tx.init, params)), batches_of(chosen))


def optimizer_of(chosen: Settings, whose: str) -> Any:
    """The optax optimizer of a peer."""
    tx = textbook_jax.optimizer(chosen.learning_rate, chosen.b2, chosen.weight_decay, chosen.clip_norm)
    return textbook_jax.contrib(tx, chosen.rho) if whose == "optax.contrib" else tx


def weights_of(model: ModelConfig) -> Any:
    """Shapes of the weights, a Flax tree."""
    found: Any = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes(model).items()}
    return nested(found)


def batches_of(chosen: Settings) -> MicroBatches:
    rows, c = chosen.batch // chosen.micro_batches, chosen.model
    shaped = jax.ShapeDtypeStruct
    if isinstance(c, ViTConfig):
        batch = {
            "pixels": shaped((rows, c.height, c.image_width, c.channels), jnp.uint8),
            "labels": shaped((rows, 1), jnp.int32),
            "weights": shaped((rows, 1), jnp.float32),
        }
    else:
        batch = {"tokens": shaped((rows, c.seq_len + 1), jnp.int32)}
    return MicroBatches(batch for _ in range(chosen.micro_batches))


def _logits(chosen: Settings) -> Any:
    """(params, batch) -> (logits_NxV, labels_N)."""
    module = module_of("flax", chosen.model)
    model = module.Model(chosen.model)

    def logits(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        cast = jax.tree.map(lambda x: x.astype(chosen.dtype), params)
        head = module.features(model, cast, batch)
        z_NxV = head.hidden @ head.weight.T
        return z_NxV if head.bias is None else z_NxV + head.bias, head.labels

    return logits
