"""Time by region from a trace of a few steps: the events that torch.profiler and jax.profiler write for Perfetto.

PyTorch's regions are ranges of host time; on a GPU the device time of the kernels launched within them counts. JAX's
regions are the scopes that its instructions were traced under: an event names the instruction, and the text of the
compiled program names its scope. XLA runs independent instructions at the same time; time that several of them share is
divided between them, so that regions sum to the time in which anything ran.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fsam_core.errors import UserError
from fsam_core.regions import REGIONS
from fsam_profiling.regions import IDLE, OTHER, in_order
from fsam_trainers.files import disk_errors

STEP = "fsam step"  # name of the traced steps
# Instructions that only run others, which have events of their own.
_CONTAINERS = frozenset(("while", "conditional", "call", "async-start", "async-done"))
_TRACK = 4_000_000  # process and thread number of the track of regions

Event = dict[str, Any]


class Span(NamedTuple):
    """Microseconds from `start` to `end`, and their name."""

    start: float
    end: float
    name: str


def read(path: Path) -> dict[str, Any]:
    """A trace in Chrome's JSON, gzipped or not.

    Raises:
        UserError: for a file without `traceEvents`.
    """
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = json.loads(text)
    if not isinstance(found, dict) or "traceEvents" not in found:
        raise UserError(f"{path}: the profiler left no traceEvents in it, so time cannot be attributed to regions")
    return found


def write(path: Path, trace: dict[str, Any], spans: Iterable[Span] = ()) -> None:
    """Write a gzipped trace for Perfetto, with the spans as a track of their own."""
    name = {"ph": "M", "pid": _TRACK, "name": "process_name", "args": {"name": "fsam regions"}}
    track = [
        {"ph": "X", "pid": _TRACK, "tid": _TRACK, "ts": x.start, "dur": x.end - x.start, "name": x.name} for x in spans
    ]
    events = [*trace["traceEvents"], *([name, *track] if track else [])]
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps({**trace, "traceEvents": events}).encode()))


def steps_of(events: Iterable[Event]) -> list[Span]:
    """The traced steps, in order.

    Raises:
        UserError: for a trace without steps.
    """
    found = sorted(_span(e) for e in events if e.get("ph") == "X" and e.get("name") == STEP and "dur" in e)
    if not found:
        raise UserError("trace: the profiler recorded no step; this version of it cannot be read")
    return found


def torch_spans(events: list[Event]) -> list[Span]:
    """One span for each range of the host, or for each kernel where any ran on a GPU.

    Raises:
        UserError: where no range has the name of a region.
    """
    ranges = sorted(
        _span(e) for e in events if e.get("cat") == "user_annotation" and e.get("name") in REGIONS and "dur" in e
    )
    if not ranges:
        raise UserError("trace: no region was recorded; was the step taken by fsam_core?")
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return ranges
    launched = {
        e["args"]["correlation"]: float(e["ts"])
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    return [
        _span(e)._replace(name=_at(ranges, launched.get(e.get("args", {}).get("correlation"), -1.0))) for e in kernels
    ]


def jax_spans(events: list[Event], programs: dict[str, dict[str, tuple[str, str]]]) -> list[Span]:
    """One span for each instruction that ran.

    Args:
        programs: module's name -> instruction -> (opcode, region), from the compiled programs' texts.

    Raises:
        UserError: where no event names an instruction of these programs.
    """
    found = []
    for event in events:
        at = event.get("args") or {}
        instruction = programs.get(at.get("hlo_module", ""), {}).get(at.get("hlo_op", ""))
        if event.get("ph") == "X" and "dur" in event and instruction and instruction[0] not in _CONTAINERS:
            found.append(_span(event)._replace(name=instruction[1]))
    if not found:
        raise UserError("trace: no event names an instruction of the compiled step; this profiler cannot be read")
    return found


def by_region(spans: Iterable[Span], steps: list[Span]) -> dict[str, float]:
    """Milliseconds a step of each region in the order they run, of OTHER and of IDLE.

    Time that several spans share is divided between them.
    """
    total: dict[str, float] = defaultdict(float)
    begin, end = steps[0].start, steps[-1].end
    edges = sorted(
        edge
        for x in spans
        if x.end > begin and x.start < end
        for edge in ((max(x.start, begin), 1, x.name), (min(x.end, end), -1, x.name))
    )
    running: dict[str, int] = defaultdict(int)
    busy, before = 0.0, begin
    for at, change, name in edges:
        count = sum(running.values())
        if count and at > before:
            busy += at - before
            for each, n in running.items():
                total[each] += (at - before) * n / count
        before = at
        running[name] += change
    found = {name: us / 1e3 / len(steps) for name, us in in_order(total).items()}
    idle = sum(x.end - x.start for x in steps) - busy
    return found | {IDLE: max(0.0, idle) / 1e3 / len(steps)}


def merged(spans: Iterable[Span], gap: float = 50.0) -> list[Span]:
    """Join neighbouring spans of one region where no other begins between them and the gap is at most `gap` us."""
    found: list[Span] = []
    for span in sorted(spans):
        last = found[-1] if found else None
        if last and last.name == span.name and span.start - last.end <= gap:
            found[-1] = last._replace(end=max(last.end, span.end))
        elif last is None or span.end > last.end:
            # Spans on one track may not overlap.
            found.append(span._replace(start=max(span.start, last.end if last else span.start)))
    return [x for x in found if x.end > x.start]


def _span(event: Event) -> Span:
    return Span(float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"])


def _at(ranges: list[Span], moment: float) -> str:
    return next((x.name for x in ranges if x.start <= moment <= x.end), OTHER)
