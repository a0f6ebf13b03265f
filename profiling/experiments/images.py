"""Methods on images: AdamW and four corrections, tuned, several seeds, at equal steps and at equal operations.

    python profiling/experiments/images.py --data digits --steps 300 --out runs/images-digits --docs docs/results

Writes DOCS/images-NAME.json and .png, and the tables of all such files into DOCS/images.md. Every step is a command of
`fsam`, whose runs are resumed: the same command resumes a stopped experiment. Nothing is timed: a machine may do other
work beside it. The ratio of costs is the cost model's, of matrix products.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from images_report import write

# Row -> (method, its own options in the form of `fsam compare --methods`, values of rho, which are extended).
SMALL = "0.0125,0.025,0.05"
ROWS: dict[str, tuple[str, str, str]] = {
    "SAM": ("sam", "", "0.05,0.1,0.2"),
    "preconditioned SAM": ("precond-sam", "", SMALL),
    "preconditioned Functional-SAM": ("precond-functional-sam", "", SMALL),
    "preconditioned SAM, split 1/2": ("precond-sam", "form=split:ascent=rest:correction-fraction=0.5", SMALL),
}

# Two threads that wait for one another on cores with other work took 30 times as long, and the model is small.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Options:
    """Tune AdamW and four corrections, train them with several seeds, and write tables and plots."""

    data: str = "digits"
    """a set of images, as of fsam train --task images"""
    name: str | None = None
    """of the files that are written (default: that of the data)"""
    steps: int = 300
    """of each run"""
    seeds: int = 3
    """runs of each method"""
    rates: str = "5e-4,1e-3,2e-3"
    """AdamW's learning rates; the other methods have the best of them"""
    more: str = "--framework torch --weight-decay 0.05"
    """other options of all runs"""
    out: Path = Path("runs/images")
    """folder of the runs"""
    docs: Path = Path("docs/results")
    """where tables and plots are written"""


def main(options: Options) -> None:
    same = ["--task", "images", "--data", options.data, "--steps", str(options.steps), *options.more.split(), "--quiet"]
    tune = ["tune", *same, "--out", str(options.out / "tune")]
    (adamw,) = _run(options, [*tune, "--method", "adamw", "--grid", f"learning-rate={options.rates}"], "tune-adamw")[
        "rows"
    ]
    rate = adamw["values"]["learning-rate"]
    methods = {"AdamW": f"adamw:learning-rate={rate}"}
    for number, (row, (method, own, radii)) in enumerate(ROWS.items()):
        grid = ",".join([f"rho={radii}", *own.split(":")] if own else [f"rho={radii}"])
        command = [*tune, "--method", method, "--learning-rate", rate, "--grid", grid]
        found = _run(options, command, f"tune-{number}")["rows"][-1]
        methods[row] = ":".join(filter(None, (method, f"learning-rate={rate}", f"rho={found['values']['rho']}", own)))
    compared = {}
    for budget in ("steps", "flops"):
        command = ["compare", *same, "--methods", ",".join(methods.values()), "--seeds", str(options.seeds)]
        command += ["--budget", budget, "--out", str(options.out / budget)]
        compared[budget] = _run(options, command, budget)
    write(options.name or Path(options.data).stem, compared, methods, adamw, options.docs)


def _run(options: Options, command: list[str], name: str) -> dict[str, Any]:
    """The figures of a command of `fsam`, from the file of an earlier call if there is one."""
    path = options.out / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print("fsam", *command, flush=True)
        unfinished = path.with_suffix(".part")
        whole = [sys.executable, "-m", "fsam_trainers.cli", *command, "--json", str(unfinished)]
        subprocess.run(whole, check=True, env=os.environ | ONE_THREAD)
        unfinished.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options))
