"""`fsam sharpness`: the profiling package's command, found by name."""

from __future__ import annotations

import importlib


def main(arguments: list[str]) -> int:
    """Run it; returns the exit code."""
    return importlib.import_module("fsam_profiling.sharpness.cli").main(arguments)
