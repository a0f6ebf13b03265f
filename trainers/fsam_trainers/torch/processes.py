"""The processes of a PyTorch run, one device each: its default process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fsam_trainers.processes import HOST_TIMEOUT, STEP_TIMEOUT, Processes, number

T = TypeVar("T")


class TorchProcesses(Processes):
    """Processes in PyTorch's default group for steps, and in a second group (gloo) for everything else."""

    def __init__(self) -> None:
        self.rank, self.count, self.local_rank = (number(x) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.timeout = float(os.environ.get("FSAM_RANK_TIMEOUT", STEP_TIMEOUT))
        backend = "gloo"
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(self.local_rank)
            device = torch.accelerator.current_accelerator()
            assert device is not None
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=HOST_TIMEOUT))

    def all_reduce_max(self, *values: int) -> list[int]:
        largest = torch.tensor(values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._host)
        return values

    def close(self) -> None:
        dist.destroy_process_group()
