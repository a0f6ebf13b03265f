"""The command, and what torch.compile made of it: `[torchrun …] python compiled_run.py FOLDER ARGUMENTS`.

Each rank leaves FOLDER/RANK.json: how many graphs there were, how often they ran, with gradients and without, and why
any of them broke.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from fsam_trainers import cli

graphs = 0
runs = {True: 0, False: 0}  # with gradients, without
compiled = compile_fx.compile_fx


def counted(*args: Any, **options: Any) -> Any:
    global graphs
    graphs += 1
    run = compiled(*args, **options)

    def counted_run(*inputs: Any) -> Any:
        runs[torch.is_grad_enabled()] += 1
        return run(*inputs)

    return counted_run


if __name__ == "__main__":
    compile_fx.compile_fx = counted
    folder = Path(sys.argv[1])
    try:
        cli.main(sys.argv[2:])
    finally:
        found = {"graphs": graphs, "trained": runs[True], "evaluated": runs[False], "breaks": counters["graph_break"]}
        (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
