"""`fsam profile`: the profiling package's own command, found by name."""

from __future__ import annotations

import importlib


def main(arguments: list[str]) -> int:
    """Run one of its subcommands; returns the exit code."""
    return importlib.import_module("fsam_profiling.cli").main(arguments)
