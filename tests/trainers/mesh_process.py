"""One of several processes that train together: `python mesh_process.py RANK COUNT PORT FOLDER`.

Each has two virtual devices; the first leaves what the steps reported and the weights they ended in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from mesh_child import settings, train
from spawn import ONE_DEVICE

from fsam_trainers.jax.engine import JaxEngine

SHAPE, STEPS, SAVED = (2, 2, 1), 6, 3
CHANGES = {"method": "precond-functional-sam", "steps": STEPS, "model": {"dropout": 0.1}}


def main() -> None:
    rank, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ["XLA_FLAGS"] = f"{ONE_DEVICE} --xla_force_host_platform_device_count=2"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, rank)
    engine = JaxEngine(settings(SHAPE, **CHANGES))
    assert {d.process_index for d in engine.mesh.devices.flat} == set(range(count))
    reports = train(engine, 0, SAVED)
    engine.save(folder / "state").write()
    train(engine, SAVED, STEPS)
    engine.restore(folder / "state")
    reports += train(engine, SAVED, STEPS)
    weights = engine.weights()
    if rank == 0:
        (folder / "reports.json").write_text(json.dumps(reports))
        np.savez(folder / "weights.npz", **weights)


if __name__ == "__main__":
    main()
