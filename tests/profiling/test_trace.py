"""Time by region: which region an event belongs to, how shared time is divided, and traces of real steps."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from fsam_core.errors import UserError
from fsam_core.regions import REGIONS
from fsam_profiling import regions
from fsam_profiling.timing import trace, trace_events
from fsam_profiling.timing.trace_events import STEP, Span


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/base forward/jvp()/dot_general", "base forward"),
        ("jit(step)/base backward/transpose(jvp(base forward))/dot_general", "base backward"),
        ("jit(step)/transpose(jvp(second forward))/while/body/add", "second backward"),
        ("jit(step)/jvp(second forward)/tanh", "second forward"),
        ("jit(step)/while/body/update/mul", "update"),
        ("jit(step)/base backward/rematted_computation/base forward/exp", "base backward"),
        ("jit(norm)/layer_norm/mul", None),
        ("jit(step)/updated/mul", None),
        ("", None),
    ],
)
def test_operation_belongs_to_outermost_region(op_name, expected):
    assert regions.region(op_name) == expected


def event(name: str, start: float, duration: float, cat: str = "", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "cat": cat, "args": args}


STEPS = [event(STEP, 0, 1000), event(STEP, 1000, 1000)]


def test_host_ranges_are_summed_and_the_rest_is_idle():
    ranges = [event("base forward", 1000 * i + 100, 300, "user_annotation") for i in range(2)]
    ranges.append(event("update", 1500, 250, "user_annotation"))
    events = [*STEPS, *ranges, event("aten::mm", 120, 200, "cpu_op"), event("something else", 0, 9, "user_annotation")]
    found = trace_events.by_region(trace_events.torch_spans(events), trace_events.steps_of(events))
    assert found == pytest.approx({"base forward": 0.3, "update": 0.125, "idle": 0.575})
    assert list(found) == ["base forward", "update", "idle"]


def test_kernel_belongs_to_the_region_that_launched_it():
    events = [
        *STEPS,
        event("base forward", 100, 50, "user_annotation"),
        event("base backward", 200, 50, "user_annotation"),
        event("cudaLaunchKernel", 110, 2, "cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 210, 2, "cuda_runtime", correlation=2),
        event("cudaLaunchKernel", 500, 2, "cuda_runtime", correlation=3),
        event("gemm", 400, 200, "kernel", correlation=1),
        event("gemm", 600, 400, "kernel", correlation=2),
        event("memset", 1000, 100, "gpu_memset", correlation=3),
    ]
    found = trace_events.by_region(trace_events.torch_spans(events), trace_events.steps_of(events))
    assert found == pytest.approx({"base forward": 0.1, "base backward": 0.2, "other": 0.05, "idle": 0.65})


PROGRAMS = {
    "jit_step": {
        "dot.1": ("dot", "base forward"),
        "fusion.2": ("fusion", "base backward"),
        "while.3": ("while", "base backward"),
        "copy.4": ("copy", "other"),
    }
}


def test_shared_time_is_divided_and_containers_are_skipped():
    ran = lambda name, start, duration, module="jit_step": event(name, start, duration, hlo_op=name, hlo_module=module)
    events = [
        *STEPS,
        ran("dot.1", 0, 400),
        ran("fusion.2", 200, 400),
        ran("while.3", 600, 1000),
        ran("fusion.2", 700, 100),
        ran("copy.4", 1990, 100),  # runs past the last step
        ran("dot.1", 1000, 500, "jit_evaluate"),  # another program's
    ]
    spans = trace_events.jax_spans(events, PROGRAMS)
    assert len(spans) == 4
    found = trace_events.by_region(spans, trace_events.steps_of(events))
    # 200 alone, 200 shared; 200 shared, 200 alone, 100 in the loop
    assert found == pytest.approx({"base forward": 0.15, "base backward": 0.2, "other": 0.005, "idle": 0.645})


def test_region_track_joins_neighbours_without_overlap():
    spans = [Span(0, 10, "a"), Span(20, 30, "a"), Span(25, 60, "b"), Span(26, 28, "a"), Span(200, 210, "b")]
    track = trace_events.merged(spans)
    assert track == [Span(0, 30, "a"), Span(30, 60, "b"), Span(200, 210, "b")]


def test_written_trace_keeps_its_events(tmp_path):
    path = tmp_path / "deep" / "trace.json.gz"
    trace_events.write(path, {"traceEvents": STEPS, "displayTimeUnit": "ns"}, [Span(0, 10, "norm")])
    found = json.loads(gzip.decompress(path.read_bytes()))
    assert found["displayTimeUnit"] == "ns"
    assert found["traceEvents"][:2] == STEPS
    assert [e["name"] for e in found["traceEvents"][2:]] == ["process_name", "norm"]
    assert trace_events.read(path) == found


def test_unknown_trace_format_is_refused(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="left no traceEvents"):
        trace_events.read(path)
    with pytest.raises(UserError, match="recorded no step"):
        trace_events.steps_of([event("other", 0, 1)])
    with pytest.raises(UserError, match="no region was recorded"):
        trace_events.torch_spans(STEPS)
    with pytest.raises(UserError, match="no event names an instruction"):
        trace_events.jax_spans([event("dot.9", 0, 1, hlo_op="dot.9", hlo_module="jit_step")], PROGRAMS)
    with pytest.raises(UserError, match="--steps must be at least 1, got 0"):
        trace.run(trace.TraceOptions(steps=0))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_regions_of_a_real_step_fill_it(framework, tmp_path):
    options = trace.TraceOptions(
        framework=framework, batch=4, seq_len=16, vocab_size=256, out=tmp_path, json=tmp_path / "trace.json"
    )
    assert trace.run(options) == 0
    adamw, functional = json.loads((tmp_path / "trace.json").read_text())["rows"]
    assert set(functional["regions"]) - {"other", "idle"} == set(REGIONS)
    assert {"base forward", "base backward", "update"} <= set(adamw["regions"])
    assert not {"perturb", "second forward", "second backward"} & set(adamw["regions"])
    for row in (adamw, functional):
        assert sum(row["regions"].values()) == pytest.approx(row["step_ms"], rel=0.05)
        assert row["regions"].get("other", 0) < 0.3 * row["step_ms"]
        names = {e.get("name") for e in trace_events.read(tmp_path / row["trace"].rpartition("/")[2])["traceEvents"]}
        assert set(row["regions"]) - {"other", "idle"} <= names
