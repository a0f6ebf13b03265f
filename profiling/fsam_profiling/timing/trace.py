"""A trace of a few steps with the regions named, as a file for Perfetto and as a table: `fsam profile trace`.

The times are of steps under a profiler on this machine, which slows short steps down. `fsam profile step` measures how
long a step takes; this shows where in it the time goes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fsam_core.errors import UserError
from fsam_profiling import results
from fsam_profiling.regions import in_order
from fsam_profiling.rows import frameworks_and_sizes, table_rows
from fsam_profiling.settings import random_batch, step_settings
from fsam_profiling.timing import trace_events
from fsam_profiling.timing.trace_events import Span
from fsam_profiling.tpu import hlo
from fsam_trainers import registry
from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch
from fsam_trainers.engine import Engine
from fsam_trainers.tables import show, show_lines

WARM_UP = 2


@dataclass(frozen=True)
class TraceOptions:
    """Trace a few steps: where the time goes by region, and a file for ui.perfetto.dev."""

    framework: Literal["both", "jax", "torch"] = "both"
    """jax, torch, or both"""
    preset: str = "tiny"
    """model size, as in `fsam train`"""
    batch: int | None = None
    """sequences a step"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; bfloat16 over float32 masters"""
    only: str = "adamw,precond-functional-sam"
    """methods and savings as in `fsam profile step --only`"""
    steps: int = 3
    """traced steps, after two to warm up"""
    out: Path = Path("runs/trace")
    """folder for the traces"""
    json: Path | None = None
    """also write the figures here"""


def run(options: TraceOptions) -> int:
    """Trace every variant, print the table, write the files; 0.

    Raises:
        UserError: for an unknown preset or row, fewer steps than 1, and a trace that cannot be read.
    """
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    # Before PyTorch is imported: its profiler reports on stderr when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    frameworks, sizes = frameworks_and_sizes(options)
    rows = []
    for framework in frameworks:
        for method, saving, changes in table_rows(options.only):
            chosen = step_settings(options.preset, method, framework=framework, changes=changes, **sizes)
            name = "-".join(filter(None, (framework, method, saving.replace("/", "_").replace(" ", "_"))))
            path = options.out / f"{name}.json.gz"
            print(f"tracing {framework} {method} {saving}".rstrip(), file=sys.stderr)
            rows.append(
                {"framework": framework, "method": method, "saving": saving} | traced(chosen, options.steps, path)
            )
    if options.json is not None:
        results.write(options.json, "trace", rows, {"preset": options.preset, "steps": options.steps, **sizes})
    show(table(rows, f"{options.preset}: ms a step by region, mean of {options.steps} steps under the profiler"))
    show_lines(f"traces for ui.perfetto.dev: {options.out}")
    return 0


def traced(chosen: Settings, steps: int, path: Path) -> dict[str, Any]:
    """Take `steps` steps under the profiler, write the trace to `path`.

    Returns:
        step_ms (mean), regions (name -> ms a step; "other" has no region, "idle" is time in which nothing ran),
        clock ("host" or "device"), device, trace (the file).
    """
    tokens = random_batch(chosen)
    trained = registry.make(chosen)
    trained.prepare(tokens)
    for index in range(WARM_UP):
        trained.step(tokens, index)()
    record = _torch if chosen.framework == "torch" else _jax
    trace, spans, on_device = record(trained, tokens, steps)
    taken = trace_events.steps_of(trace["traceEvents"])
    trace_events.write(path, trace, [] if chosen.framework == "torch" and not on_device else trace_events.merged(spans))
    return {
        "step_ms": sum(x.end - x.start for x in taken) / len(taken) / 1e3,
        "regions": trace_events.by_region(spans, taken),
        "clock": "device" if on_device else "host",
        "device": trained.device,
        "trace": str(path),
    }


def _torch(trained: Engine, tokens: Batch, steps: int) -> tuple[dict[str, Any], list[Span], bool]:
    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_device = torch.cuda.is_available()
    if on_device:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=kinds) as profiler:
            for index in range(WARM_UP, WARM_UP + steps):
                with torch.profiler.record_function(trace_events.STEP):
                    trained.step(tokens, index)()
        profiler.export_chrome_trace(str(path))
        trace = trace_events.read(path)
    return trace, trace_events.torch_spans(trace["traceEvents"]), on_device


def _jax(trained: Engine, tokens: Batch, steps: int) -> tuple[dict[str, Any], list[Span], bool]:
    import jax

    with tempfile.TemporaryDirectory() as folder:
        quiet = jax.profiler.ProfileOptions()
        quiet.python_tracer_level = 0  # would record every Python call: megabytes, and time
        with jax.profiler.trace(folder, profiler_options=quiet):
            for index in range(WARM_UP, WARM_UP + steps):
                with jax.profiler.StepTraceAnnotation(trace_events.STEP, step_num=index):
                    trained.step(tokens, index)()
        files = list(Path(folder).rglob("*.trace.json.gz"))
        if len(files) != 1:
            raise UserError(f"trace: JAX {jax.__version__} left {len(files)} traces instead of one")
        trace = trace_events.read(files[0])
    events = trace["traceEvents"]
    return trace, trace_events.jax_spans(events, _programs(events)), jax.default_backend() != "cpu"


def _programs(events: list[dict[str, Any]]) -> dict[str, dict[str, tuple[str, str]]]:
    """Module -> instruction -> (opcode, region), of the programs of this process that the events name."""
    import jax

    ran: dict[str, set[str]] = {}
    for event in events:
        at = event.get("args") or {}
        if "hlo_op" in at:
            ran.setdefault(at.get("hlo_module", ""), set()).add(at["hlo_op"])
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name in ran:
                known = hlo.instructions(module.to_string())
                # Of several programs of one name, take the one that holds most of the instructions that ran.
                if len(ran[module.name] & set(known)) > len(ran[module.name] & set(found.get(module.name, ()))):
                    found[module.name] = known
    return found


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """One line a variant."""
    names = list(in_order({name: 0.0 for row in rows for name in row["regions"]}))
    result = Table(title=title)
    for name in ("framework", "method", "saving"):
        result.add_column(name, no_wrap=True)
    for name in ("step", *names):
        result.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row['regions'][x]:,.1f}" if x in row["regions"] else "–" for x in names]
        result.add_row(row["framework"], row["method"], row["saving"], f"{row['step_ms']:,.1f}", *cells)
    return result
