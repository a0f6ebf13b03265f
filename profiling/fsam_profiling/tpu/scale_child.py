"""The process that compiles a sharded step for all chips of a TPU topology: `… REQUEST.json ANSWER.json`.

It is a process of its own as `compiler_child` is, and answers with the memory and the collectives of each chip.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from fsam_profiling.settings import step_settings
from fsam_profiling.tpu import collectives, step_programs
from fsam_profiling.tpu.compiler_child import memory_of, serve
from fsam_trainers.jax import mesh as jax_mesh


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile the step of request["settings"] for request["topology"], as one program."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices
    chosen = step_settings(**request["settings"])
    mesh = jax_mesh.make(chosen, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, (state, batches) = step_programs.of(chosen)
        places = jax_mesh.places(mesh, state)
        rows = NamedSharding(mesh, PartitionSpec(jax_mesh.ROWS))
        at = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        args = jax.tree.map(at, state, places), jax.tree.map(lambda x: at(x, rows), batches)
        jitted = jax.jit(function, donate_argnums=0, out_shardings=(places, None))
        compiled = jitted.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return memory_of(compiled) | {"collectives": collectives.totals(collectives.read(compiled.as_text()))}


if __name__ == "__main__":
    serve(answer)
