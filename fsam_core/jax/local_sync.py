"""`sync="local"` in JAX: every data shard follows its own perturbation (m-sharpness).

The exact method takes ε from the whole batch's gradient, so all devices wait for its reduction between the two passes.
Here every shard i of the batch along a mesh axis runs both passes alone, with ε_i from its own gradient. Only the
result is reduced: ĝ = Σ_i N_i ĝ_i / Σ_i N_i, with N_i the weight of the shard's targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fsam_core import split
from fsam_core.errors import UserError
from fsam_core.jax import correction
from fsam_core.jax.passes import is_key, upcast
from fsam_core.jax.perturbation import StepInputs, StepResult


def corrected(inputs: StepInputs, batches: list[Any], axis: str) -> StepResult:
    """`correction.corrected` for each shard of the batch along `axis`; losses and norms are weighted means.

    Along `axis` the weights are replicated, and the arrays of a batch are sharded along their first axis. A random key
    is folded with the shard's index.

    Raises:
        UserError: if the current mesh has no such axis, or a micro-batch cannot be cut into that many shards.
    """
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    if axis not in shape:
        has = ", ".join(shape) or "none: call the step under jax.set_mesh(mesh)"
        raise UserError(f"axis: the mesh in use has no axis {axis!r}; it has {has}")
    whole, rows = PartitionSpec(), PartitionSpec(axis)
    has_rows = lambda x: jnp.ndim(x) and not is_key(x)
    for x in jax.tree.leaves(batches):
        if has_rows(x) and len(x) % shape[axis]:
            raise UserError(
                f"sync='local': a micro-batch of {len(x)} rows cannot be cut into the {shape[axis]} shards of axis "
                f"{axis!r}; give it a number of rows that they divide"
            )
    for batch in batches:
        for count in {len(x) for x in jax.tree.leaves(batch) if has_rows(x)}:
            split.check_keys(batch, count, is_key, "sync='local'")
    memory = inputs.config.memory
    inside = dataclasses.replace(memory, row_axes=tuple(x for x in memory.row_axes if x != axis))
    config = inputs.config._replace(memory=inside)

    def mine(params: Any, opt_state: Any, previous: Any, batches: list[Any]) -> StepResult:
        index = jax.lax.axis_index(axis)
        own = jax.tree.map(lambda x: jax.random.fold_in(x, index) if is_key(x) else x, batches)
        here = inputs._replace(config=config, params=params, opt_state=opt_state, previous=previous)
        found = correction.corrected(here, own)
        bad_label = jax.lax.pmax(found.bad_label, axis)
        if not inputs.reuses:
            found = found._replace(g_B=None)
        weight = jax.lax.psum(found.weight, axis)
        share = found.weight / jnp.where(weight > 0, weight, 1)
        mean = lambda x: jax.lax.psum(upcast(x) * share, axis).astype(x.dtype)
        means = jax.tree.map(mean, found._replace(bad_label=jnp.float32(0)))
        return means._replace(weight=weight, bad_label=bad_label)

    # Axes of size 1 are manual too, so that a kernel, which cannot be partitioned, is in a single-device program.
    names = {axis, *(x for x, size in shape.items() if size == 1)}
    specs = jax.tree.map(lambda x: rows if has_rows(x) else whole, batches)
    # check_vma is off because the correction does not declare over which axes its values vary.
    each = jax.shard_map(
        mine, in_specs=(whole, whole, whole, specs), out_specs=whole, axis_names=names, check_vma=False
    )
    return each(inputs.params, inputs.opt_state, inputs.previous, batches)
