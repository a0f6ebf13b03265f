"""`fsam profile`: one module a subcommand, which holds its options and imports what it needs when it runs.

Only what the chosen subcommand needs must be installed; that is checked before it begins.
"""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from fsam_core import backends
from fsam_profiling import guard, guard_items, report
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
        UserError: for bad options, a package that is missing or broken, and a compiler whose output cannot be read.
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
    backends.require(*_needs(options))
    return run[type(options)](options)


def _needs(options: Any) -> list[str]:
    """The modules that a subcommand with these options imports."""
    if isinstance(options, tpu.TpuOptions):
        return ["jax"]
    if isinstance(options, step.StepOptions | trace.TraceOptions):
        frameworks = backends.TRAINING if options.framework == "both" else [options.framework]
        return [module for framework in frameworks for module in backends.TRAINING[framework]]
    if isinstance(options, guard.CheckOptions):
        items = [x for x in guard_items.items() if x.name.startswith(options.only) and (x.quick or not options.quick)]
        compilers = {compiler for item in items for compiler in item.compilers} - {"libtpu"}
        return sorted(compilers | {"torch"} if "triton" in compilers else compilers)
    return []
