"""`fsam profile`: one module a subcommand, which holds its options and imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from fsam_profiling import guard, report
from fsam_profiling.gpu import cli as gpu
from fsam_profiling.timing import parameters, step, trace
from fsam_profiling.tpu import cli as tpu
from fsam_trainers.files import writable

Command = (
    Annotated[step.StepOptions, tyro.conf.subcommand("step")]
    | Annotated[tpu.TpuOptions, tyro.conf.subcommand("tpu")]
    | Annotated[gpu.GpuOptions, tyro.conf.subcommand("gpu")]
    | Annotated[trace.TraceOptions, tyro.conf.subcommand("trace")]
    | Annotated[report.ReportOptions, tyro.conf.subcommand("report")]
    | Annotated[guard.CheckOptions, tyro.conf.subcommand("check")]
    | Annotated[parameters.ParametersOptions, tyro.conf.subcommand("parameters")]
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
        step.StepOptions: step.run,
        tpu.TpuOptions: tpu.run,
        gpu.GpuOptions: gpu.run,
        trace.TraceOptions: trace.run,
        report.ReportOptions: report.run,
        guard.CheckOptions: guard.run,
        parameters.ParametersOptions: parameters.run,
    }
    return run[type(options)](options)
