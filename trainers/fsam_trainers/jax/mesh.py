"""The sharding of a run's arrays: axes of the mesh, parameters by name, batches, sharded initialisation.

All of it is `jit` with shardings: the step is one program on 1 to N devices, and what it computes does not depend on
the mesh beyond rounding.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_trainers.config import Settings
from fsam_trainers.placement import AXES, ROWS, check_divides, check_model, sizes

# The sharding of a stored matrix. qkv is [D, 3 A], three matrices side by side: shards along 3 A would not be whole
# heads. It is therefore stored sharded along D, and `in_use` reshards it by heads; so is kv, of two.
_SIDE_BY_SIDE = {"qkv": 3, "kv": 2}
_PLACES = {
    "embedding": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("tensor", "fsdp"),
    "positions": PartitionSpec(None, "fsdp"),
    "patches": PartitionSpec(None, "fsdp"),
    **dict.fromkeys(_SIDE_BY_SIDE, PartitionSpec(("tensor", "fsdp"), None)),
    "q": PartitionSpec("fsdp", "tensor"),
    "attention_out": PartitionSpec("tensor", "fsdp"),
    "mlp_gate": PartitionSpec("fsdp", "tensor"),
    "mlp_in": PartitionSpec("fsdp", "tensor"),
    "mlp_out": PartitionSpec("tensor", "fsdp"),
}


def make(settings: Settings, devices: Any = None) -> Mesh:
    """The mesh of a run; on one host it may take fewer devices than there are, the first ones.

    Raises:
        UserError: when the devices, the batch or the model cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes(settings).values())
    wanted, there = math.prod(shape), len(devices)
    if wanted > there or (jax.process_count() > 1 and wanted != there):
        raise UserError(
            f"--data-parallel, --fsdp and --tensor-parallel: {' x '.join(map(str, shape))} = {wanted} devices are "
            f"asked for and there {'is 1' if there == 1 else f'are {there}'}; give sizes whose product is {there}"
        )
    processes = jax.process_count()
    if (wanted // settings.tensor_parallel) % processes:
        raise UserError(
            f"--tensor-parallel {settings.tensor_parallel}: its devices must be of one process, and the {processes} "
            f"processes have {wanted // processes} each; give sizes whose --data-parallel x --fsdp {processes} divides"
        )
    part, size = settings.batch // settings.micro_batches, sizes(settings)
    check_divides("--batch", part, "sequences of a micro-batch", math.prod(size[axis] for axis in ROWS), ROWS)
    check_model(settings)
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_axes(settings: Settings) -> tuple[str, ...]:
    """The axes that sequences are spread over, for `fsam_core.jax.Memory`; none on a single device."""
    return tuple(axis for axis in ROWS if sizes(settings)[axis] > 1)


def backend(settings: Settings) -> str:
    """The backend of the head: Pallas' kernel takes whole rows of the vocabulary, so "auto" is "xla" if it is sharded.

    Raises:
        UserError: if Pallas is requested with a sharded vocabulary, and as `backends.choose`.
    """
    chosen = backends.choose("jax", settings.backend)
    if chosen.name != "pallas" or settings.tensor_parallel == 1:
        return chosen.name
    if chosen.reason.startswith("auto"):
        return "xla"
    raise UserError(
        "--backend: pallas takes whole rows of the vocabulary, which --tensor-parallel "
        f"{settings.tensor_parallel} cuts; give --backend xla, or --fsdp instead"
    )


def places(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree with parameters' names as last keys: weights, moments, averages."""
    place = lambda path: NamedSharding(mesh, _PLACES.get(getattr(path[-1], "key", ""), PartitionSpec()))
    return jax.tree_util.tree_map_with_path(lambda path, _: place(path), tree)


def placed(mesh: Mesh, tree: Any) -> Any:
    """NumPy arrays by parameter name as sharded ones: each device is sent its own part and never holds another's."""
    put = lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: np.asarray(x[index]))
    return jax.tree.map(put, tree, places(mesh, tree))


def rows(mesh: Mesh, x_B: np.ndarray) -> jax.Array:
    """A batch that every process has in full, sharded along its first axis over as many devices as divide it."""
    place = NamedSharding(mesh, PartitionSpec(_dividing(len(x_B), dict(mesh.shape))))
    return jax.make_array_from_callback(x_B.shape, place, lambda index: x_B[index])


def own_rows(mesh: Mesh, x_b: np.ndarray) -> jax.Array:
    """The global batch, of which each process passes the rows of its own devices, in the order of the processes."""
    count = jax.process_count()
    if count == 1:
        return rows(mesh, x_b)
    place, shape = NamedSharding(mesh, PartitionSpec(ROWS)), (count * len(x_b), *x_b.shape[1:])
    return jax.make_array_from_process_local_data(place, x_b, shape)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of replicated values."""
    return NamedSharding(mesh, PartitionSpec())


def whole(x: jax.Array) -> np.ndarray:
    """The full array, in every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


# --- inside the model -------------------------------------------------------------------------------------------------


def by_rows(x: jax.Array, *others: str | None, sequences: int | None = None) -> jax.Array:
    """An activation sharded along its first axis over data and fsdp, and along the other axes as `others` says.

    Left as it is where no mesh is in use, and along axes over which the program is written device by device
    (`shard_map`). `sequences` is what is spread where the first axis is flattened from them.
    """
    found = _auto_axes()
    return _constrained(x, found, _dividing(len(x) if sequences is None else sequences, found), *others)


def in_use(name: str, x: jax.Array) -> jax.Array:
    """A parameter as the model uses it: gathered over fsdp, still sharded over tensor; qkv as [D, 3, A].

    Without this the compiler may as well leave the matrix cut and move activations, which are larger.
    """
    found = _auto_axes()
    if name in _SIDE_BY_SIDE:
        x = x.reshape(len(x), _SIDE_BY_SIDE[name], -1)
        # In two steps: gather over fsdp, then exchange between the devices of tensor. In one step the compiler gathers
        # the whole matrix on every device.
        return _constrained(_constrained(x, found, "tensor"), found, None, None, "tensor")
    place = _PLACES.get(name, PartitionSpec())
    return _constrained(x, found, *(axis if axis == "tensor" else None for axis in place))


def _auto_axes() -> dict[str, int]:
    """Axes of the current mesh with more than one device over which the compiler shards, not the program itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {a: n for a, n in mesh.shape.items() if a in AXES and n > 1 and kinds[a] == AxisType.Auto}


def _dividing(number: int, found: dict[str, int]) -> tuple[str, ...]:
    """The row axes over which so many sequences can be sharded evenly."""
    axes, count = [], 1
    for axis in ROWS:
        if axis in found and number % (count * found[axis]) == 0:
            axes.append(axis)
            count *= found[axis]
    return tuple(axes)


def _constrained(x: jax.Array, found: dict[str, int], *spec: Any) -> jax.Array:
    if not found:
        return x
    kept = lambda axis: axis if isinstance(axis, tuple) or axis in found else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(kept(axis) or None for axis in spec)))
