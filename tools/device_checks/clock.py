"""Times and memory of calls on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

WARM_UP = 2


def milliseconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The median of `repeats` calls after a warm-up, by CUDA events; on a CPU by the wall clock."""
    for _ in range(WARM_UP):
        call()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """What a call allocates at its peak beside what is held before it; None on a CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def idle_share(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """The share of a call's time in which no kernel ran, and how many ran, from one profiled call; {} on a CPU.

    Kernels that overlap are counted once. The profiler slows the host, so the share is an upper bound.
    """
    if device != "cuda":
        call()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    return idle(ranges)


def idle(ranges: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The share of the time from the first start to the last end that is in none of these ranges, sorted by start."""
    if not ranges:
        return {}
    busy, until = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"idle_share": 1 - busy / (until - ranges[0][0]), "launches": len(ranges)}
