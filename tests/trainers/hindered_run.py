"""The command on a disk that is slow or refuses: `[torchrun …] python hindered_run.py ARGUMENTS`.

HINDERED_SECONDS: how long each phase of a checkpoint's writing takes more. HINDERED_BYTES: the largest file that the
rank HINDERED_RANK (0 unless given) may write.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsam_trainers import cli, saving

in_background = saving._in_background


def slowly(function: Callable[[], Any], target: Path) -> Any:
    def later() -> Any:
        time.sleep(float(os.environ.get("HINDERED_SECONDS", 0)))
        return function()

    return in_background(later, target)


if __name__ == "__main__":
    saving._in_background = slowly
    size = os.environ.get("HINDERED_BYTES")
    if size and os.environ.get("RANK", "0") == os.environ.get("HINDERED_RANK", "0"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    cli.main(sys.argv[1:])
