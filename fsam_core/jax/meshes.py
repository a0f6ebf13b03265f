"""Meshes whose axes JAX's types know: arrays on Explicit axes, and values that vary inside of a `jax.shard_map`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from fsam_core.errors import UserError

WHOLE = PartitionSpec()


def in_auto_mode(function: Callable[..., Any], args: tuple[Any, ...], out: Any) -> Any:
    """function(*args), traced as on Auto axes where the arrays lie on Explicit ones, as `jax.make_mesh` makes them.

    There the compiler chooses how results are sharded. In Explicit mode each product of two arrays that are sharded
    along their rows, as w̄ = z̄ᵀ h, would have to say it.

    Args:
        out: (the specs of the args' arrays) -> those of the results, a prefix of their tree; only called on Explicit
            axes.

    Raises:
        UserError: inside of a `jax.shard_map` that checks over which axes values vary.
    """
    leaves, tree = jax.tree.flatten(args)
    types = [jax.typeof(x) if is_array(x) else None for x in leaves]
    varying = {axis for one in types for axis in _varying(one)}
    if varying:
        axes = ", ".join(sorted(varying))
        raise UserError(
            f"value_and_grad: inside of a jax.shard_map whose values vary over {axes}, jax itself sums the gradients "
            "of replicated params; give that shard_map check_vma=False"
        )
    shardings = [getattr(one, "sharding", None) for one in types]
    meshes = [x.mesh for x in shardings if x is not None and AxisType.Explicit in x.mesh.axis_types]
    if not meshes:
        return function(*args)
    places = [i for i, one in enumerate(types) if one is not None]

    def rebuilt(*arrays: Any) -> Any:
        found = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            found[i] = x
        return function(*jax.tree.unflatten(tree, found))

    specs = jax.tree.unflatten(tree, [WHOLE if x is None else x.spec for x in shardings])
    current = jax.sharding.get_abstract_mesh()
    with contextlib.nullcontext() if not current.empty else _context(leaves, meshes[0]):
        return jax.sharding.auto_axes(rebuilt, out_sharding=out(specs))(*(leaves[i] for i in places))


def _context(leaves: list[Any], mesh: AbstractMesh) -> contextlib.AbstractContextManager[Any]:
    """The mesh as the current one. Outside of a trace with its devices: Adam's count, say, may lie on one alone."""
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return jax.sharding.use_abstract_mesh(mesh)
    of = (getattr(getattr(x, "sharding", None), "mesh", None) for x in leaves)
    return jax.set_mesh(next(one for one in of if one is not None and one.abstract_mesh == mesh))


def is_array(x: Any) -> bool:
    """Whether JAX computes with x; a batch may hold text, too."""
    kind = getattr(x, "dtype", None)
    return kind is not None and any(jnp.issubdtype(kind, one) for one in (np.number, np.bool_, jax.dtypes.extended))


def _varying(kind: Any) -> frozenset[str]:
    return getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())
