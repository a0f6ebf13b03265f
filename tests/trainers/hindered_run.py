"""The command where steps or the disk are slow, or the disk refuses: `[torchrun …] python hindered_run.py ARGUMENTS`.

HINDERED_STEP_SECONDS: how long the main process waits after each line of its metrics; a test may then interrupt a run
whose steps are short. HINDERED_SECONDS: how much longer each phase of a checkpoint's writing takes. HINDERED_BYTES: the
largest file that the rank HINDERED_RANK (0 unless given) may write.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsam_trainers import cli, metrics, saving

in_background, write = saving._in_background, metrics.JsonLines.write


def slowly(function: Callable[[], Any], target: Path) -> Any:
    def later() -> Any:
        time.sleep(float(os.environ.get("HINDERED_SECONDS", 0)))
        return function()

    return in_background(later, target)


def write_slowly(self: metrics.JsonLines, value: dict[str, Any]) -> None:
    write(self, value)
    time.sleep(float(os.environ.get("HINDERED_STEP_SECONDS", 0)))


if __name__ == "__main__":
    saving._in_background = slowly
    metrics.JsonLines.write = write_slowly  # type: ignore[method-assign]
    size = os.environ.get("HINDERED_BYTES")
    if size and os.environ.get("RANK", "0") == os.environ.get("HINDERED_RANK", "0"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    cli.main()
