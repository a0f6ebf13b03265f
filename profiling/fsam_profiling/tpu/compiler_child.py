"""The process that compiles for a TPU: `python -m fsam_profiling.tpu.compiler_child REQUEST.json ANSWER.json`.

It is a process of its own because the compiler reads its options once, when it is loaded. `compiler.compile_for` starts
it and reads its answer: the compiled text, the compiler's memory and cost figures, grid and blocks of each Pallas call.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fsam_profiling import flops


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the request in the file that the command line names first, in the one that it names second."""
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(answer(request)))


def memory_of(compiled: Any) -> dict[str, int]:
    """The compiler's figures of a program's memory."""
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile request["function"] for request["topology"]; returns the compiler's text and figures.

    It is called with request["options"] and returns (function, arguments).
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices[:1]
    mesh = Mesh(np.array(devices), ("x",))
    placed = NamedSharding(mesh, PartitionSpec())
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        info = pltpu.get_tpu_info()
        function, args = function(**request["options"])
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tuple(args))
        traced = jax.jit(function, donate_argnums=tuple(request["donate"])).trace(*args)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    cost = compiled.cost_analysis() or {}
    return {
        "text": compiled.as_text(),
        **memory_of(compiled),
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "product_flops": flops.of_trace(traced.jaxpr),
        "calls": [_call(eqn) for eqn in _pallas_calls(traced.jaxpr.jaxpr)],
        "chip": {
            "bytes_per_second": info.mem_bw_bytes_per_second,
            "flops_per_second": info.bf16_ops_per_second,
            "mxus": info.num_mxus,
            "vmem_bytes": info.vmem_capacity_bytes,
        },
    }


def _pallas_calls(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _pallas_calls(inner)


def _call(eqn: Any) -> dict[str, Any]:
    """One pallas_call: its grid, and for every operand and result the shape and the bytes that its blocks move."""
    mapping = eqn.params["grid_mapping"]
    grid = tuple(int(x) for x in mapping.grid)
    arrays = [*eqn.invars, *eqn.outvars]
    blocks = list(mapping.block_mappings)
    skipped = len(arrays) - len(blocks)  # prefetched scalars come first and have no block
    return {
        "grid": grid,
        "shapes": [_shape(x.aval) for x in arrays],
        "moved": [0] * skipped + [_moved(block, grid) for block in blocks],
    }


def _shape(aval: Any) -> str:
    # As XLA writes it: bf16[8192,1024].
    kinds: dict[str, str] = {"float": "f", "int": "s", "uint": "u", "bfloat": "bf", "bool": "pred"}
    name = str(aval.dtype)
    letters = name.rstrip("0123456789")
    return f"{kinds.get(letters, letters)}{name[len(letters) :]}[{','.join(map(str, aval.shape))}]"


def _moved(block: Any, grid: tuple[int, ...]) -> int | None:
    """Bytes copied for one array: its block's part inside the array, each time the index changes over the grid."""
    array = block.array_aval
    try:
        sizes = [1 if x is None else int(getattr(x, "block_size", x)) for x in block.block_shape]
        at = _indices(block.index_map_jaxpr, grid)
    except (TypeError, ValueError):
        return None  # a block whose index depends on data
    inside = np.ones(len(at), np.int64)
    for i, (size, dim) in enumerate(zip(sizes, array.shape, strict=True)):
        inside *= np.clip(dim - at[:, i] * size, 0, size)
    changed = np.concatenate([[True], (at[1:] != at[:-1]).any(axis=1)]) if len(at) else np.zeros(0, bool)
    return int(inside[changed].sum()) * jnp.dtype(array.dtype).itemsize


def _indices(closed: Any, grid: tuple[int, ...]) -> np.ndarray:
    """The block index of every step of the grid, in the order they run: [steps, dimensions]."""
    steps = math.prod(grid)
    if len(closed.jaxpr.invars) != len(grid):
        raise ValueError("the index depends on prefetched scalars")
    at: Callable = lambda *i: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *i)
    columns = np.unravel_index(np.arange(steps), grid) if grid else ()
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.vmap(at)(*(jnp.asarray(x, jnp.int32) for x in columns)) if grid else at()
    return np.stack([np.broadcast_to(np.asarray(x), (steps,)) for x in out], axis=1).astype(np.int64)


if __name__ == "__main__":
    serve(answer)
