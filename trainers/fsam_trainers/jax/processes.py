"""The processes of a JAX run, each with its own devices, joined through `jax.distributed`."""

from __future__ import annotations

import os
import pickle
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fsam_trainers.processes import STEP_TIMEOUT, Processes, number

T = TypeVar("T")


class JaxProcesses(Processes):
    """Processes joined through `jax.distributed`; on CPUs they talk through gloo.

    The coordinator is the main rank, at the port after MASTER_PORT, where torchrun listens itself. A process that is
    one of several on its host (LOCAL_WORLD_SIZE) takes one GPU, an only one all devices that are there.
    """

    hangs_after_failure = True

    def __init__(self) -> None:
        self.rank, self.count, self.local_rank = (number(x) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        own = [self.local_rank] if number("LOCAL_WORLD_SIZE", 1) > 1 else None
        self.timeout = float(os.environ.get("FSAM_RANK_TIMEOUT", STEP_TIMEOUT))
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"{os.environ['MASTER_ADDR']}:{number('MASTER_PORT') + 1}",
            self.count,
            self.rank,
            local_device_ids=own,
            initialization_timeout=int(self.timeout),
            heartbeat_timeout_seconds=int(self.timeout),
        )

    def all_reduce_max(self, *values: int) -> list[int]:
        rows: Any = multihost_utils.process_allgather(np.array(values, np.int32))
        return rows.max(0).tolist()

    def gathered(self, value: T) -> list[T]:
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(own)))
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: len(own)] = own
        rows: Any = multihost_utils.process_allgather(padded)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
