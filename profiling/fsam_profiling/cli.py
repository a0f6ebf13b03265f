"""`fsam profile`: one module a subcommand, which holds its options and imports what it needs when it runs.

Only what the chosen subcommand needs must be installed; that is checked before it begins.
"""

from __future__ import annotations

import textwrap
from typing import Any

from fsam_core import backends
from fsam_profiling import guard, guard_items, report
from fsam_profiling.gpu import cli as gpu
from fsam_profiling.timing import parameters, step, trace
from fsam_profiling.tpu import cli as tpu
from fsam_trainers.cli.parsing import no_command, parsed
from fsam_trainers.files import writable

# Subcommand -> (its options, what runs it).
COMMANDS: dict[str, tuple[type, Any]] = {
    "step": (step.StepOptions, step.run),
    "trace": (trace.TraceOptions, trace.run),
    "parameters": (parameters.ParametersOptions, parameters.run),
    "tpu": (tpu.TpuOptions, tpu.run),
    "gpu": (gpu.GpuOptions, gpu.run),
    "check": (guard.CheckOptions, guard.run),
    "report": (report.ReportOptions, report.run),
}
USAGE = "usage: fsam profile SUBCOMMAND [OPTIONS]\n\n" + "".join(
    textwrap.fill(
        " ".join((options.__doc__ or "").split()), 80, initial_indent=f"  {name:12}", subsequent_indent=14 * " "
    )
    + "\n"
    for name, (options, _) in COMMANDS.items()
)


def main(arguments: list[str]) -> int:
    """Run one subcommand; returns the exit code.

    Raises:
        UserError: for bad options, a package that is missing or broken, and a compiler whose output cannot be read.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise no_command(name, list(COMMANDS), "fsam profile", "subcommand of fsam profile")
    kind, run = COMMANDS[name]
    options: Any = parsed(kind, rest, f"fsam profile {name}")
    if options.json is not None:
        writable("--json", options.json)
    backends.require(*_needs(options))
    return run(options)


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
    return ["matplotlib", "jinja2"] if isinstance(options, report.ReportOptions) else []
