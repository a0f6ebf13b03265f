"""Memory of this process; Linux alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_PEAK = Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Whether this system tells the peak of a process."""
    return _PEAK.exists()


def growth(call: Callable[[], object]) -> int:
    """By how many bytes the peak of the process during a call passes what it held before."""
    _PEAK.write_text("5")  # the peak begins here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
