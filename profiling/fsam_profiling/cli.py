"""`fsam profile`: the subcommands, each a module of this package."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from fsam_profiling import gpu, guard, parameter_step, report, step_cost, tpu, trace
from fsam_trainers.files import writable

Command = (
    Annotated[step_cost.Options, tyro.conf.subcommand("step")]
    | Annotated[tpu.Tpu, tyro.conf.subcommand("tpu")]
    | Annotated[gpu.Gpu, tyro.conf.subcommand("gpu")]
    | Annotated[trace.Trace, tyro.conf.subcommand("trace")]
    | Annotated[report.Report, tyro.conf.subcommand("report")]
    | Annotated[guard.Check, tyro.conf.subcommand("check")]
    | Annotated[parameter_step.Options, tyro.conf.subcommand("parameters")]
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
        step_cost.Options: step_cost.run,
        tpu.Tpu: tpu.run,
        gpu.Gpu: gpu.run,
        report.Report: report.run,
        guard.Check: guard.run,
        parameter_step.Options: parameter_step.run,
        trace.Trace: trace.run,
    }
    return run[type(options)](options)
