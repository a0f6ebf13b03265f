"""Saving a PyTorch state: it is planned and copied to the host at once, and written in another thread.

The phases of `torch.distributed.checkpoint.save`, by its own planner and writer. Its `async_save` would talk to other
ranks from its thread, which is where a lost one is noticed last, and copies nothing that lies in the host's memory.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from fsam_trainers import processes
from fsam_trainers.engine import Writing
from fsam_trainers.files import disk_errors


class _Copies(DefaultSavePlanner):
    """Gives the writer the values that this rank's part of the plan had when `take` was called."""

    def take(self) -> None:
        resolve = super().resolve_data
        self._taken = {item.index: _copied(resolve(item)) for item in self.plan.items}
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._taken[write_item.index]

    def drop(self) -> None:
        self._taken.clear()


def begin(state: dict[str, Any], folder: Path) -> Writing:
    """Copy this rank's part of `state`; replicated values are divided among the ranks.

    Raises:
        UserError: when the disk refuses the folder.
    """
    here = processes.current()
    # No copying ahead: the writer's input is on the host, and its thread has no current device.
    planner, writer = _Copies(), FileSystemWriter(folder, per_thread_copy_ahead=0)
    planner.set_up_planner(state, writer.storage_meta(), here.is_main)
    writer.set_up_storage_writer(here.is_main)

    def own() -> SavePlan:
        with disk_errors(folder):
            return writer.prepare_local_plan(planner.create_local_plan())

    plans, metadata = planner.create_global_plan(here.from_all(own))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[here.rank])
    planner.take()

    def write() -> Any:
        try:
            return writer.write_data(plan, planner).wait()
        finally:
            planner.drop()

    return Writing(write, lambda results: writer.finish(metadata, results))


def _copied(data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    # Copied even if it is on the host: the next step overwrites weights and moments in place.
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data
