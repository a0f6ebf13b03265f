"""`fsam profile`: the subcommands, each a module of this package."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from fsam_profiling import guard, report
from fsam_profiling.gpu import cli as gpu
from fsam_profiling.timing import parameters, step, trace
from fsam_profiling.tpu import cli as tpu
from fsam_trainers.files import writable

Command = (
    Annotated[step.Options, tyro.conf.subcommand("step")]
    | Annotated[tpu.Tpu, tyro.conf.subcommand("tpu")]
    | Annotated[gpu.Gpu, tyro.conf.subcommand("gpu")]
    | Annotated[trace.Trace, tyro.conf.subcommand("trace")]
    | Annotated[report.Report, tyro.conf.subcommand("report")]
    | Annotated[guard.Check, tyro.conf.subcommand("check")]
    | Annotated[parameters.Options, tyro.conf.subcommand("parameters")]
)


def main(arguments: list[str]) -> int:
    """Run one subcommand; returns the exit code.

    Raises:
        UserError: for bad options, and for a compiler whose output cannot be read.
    """
    options = tyro.cli(Command, prog="fsam profile", args=arguments)
    if options.json is not None:
        writable("--json", options.json)
    run: Any = {
        step.Options: step.run,
        tpu.Tpu: tpu.run,
        gpu.Gpu: gpu.run,
        report.Report: report.run,
        guard.Check: guard.run,
        parameters.Options: parameters.run,
        trace.Trace: trace.run,
    }
    return run[type(options)](options)
