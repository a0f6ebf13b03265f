"""`fsam profile`: the subcommands, each a module of this package."""

from __future__ import annotations

from typing import Annotated

import tyro

from fsam_profiling import gpu, step_cost, tpu
from fsam_trainers.files import writable

Command = (
    Annotated[step_cost.Options, tyro.conf.subcommand("step")]
    | Annotated[tpu.Tpu, tyro.conf.subcommand("tpu")]
    | Annotated[gpu.Gpu, tyro.conf.subcommand("gpu")]
)


def main(arguments: list[str]) -> int:
    """Run one subcommand; returns the exit code.

    Raises:
        UserError: for bad options, and for a compiler whose output cannot be read.
    """
    options = tyro.cli(Command, prog="fsam profile", args=arguments)
    if options.json is not None:
        writable("--json", options.json)
    if isinstance(options, tpu.Tpu):
        return tpu.run(options)
    return gpu.run(options) if isinstance(options, gpu.Gpu) else step_cost.run(options)
