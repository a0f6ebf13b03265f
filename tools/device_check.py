"""The first minutes on a real GPU: is every kernel right, how fast is it, and what does a step cost?

    python tools/device_check.py --out device.json              on a GPU, eight minutes at most
    TRITON_INTERPRET=1 python tools/device_check.py --small      on a CPU: tiny shapes, so that no typo meets the GPU

Needs PyTorch, Triton and NumPy, and nothing installed: it finds the packages beside it. Each section has a share of the
time, and skips what does not fit into it. The file is written after every section, and every few seconds in between.

Sections: environment, correctness, kernels, heads, steps. Exit code 1 if a check failed or anything raised.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("tools", "kernels", "trainers", "profiling", "")]

from device_checks import environment, heads, kernels, logits, products, steps, weights  # noqa: E402
from device_checks.report import Report  # noqa: E402
from device_checks.sizes import FULL, SMALL, Sizes  # noqa: E402

# Section -> (its share of the time, what it runs).
SECTIONS = {
    "environment": (0.05, (environment.run,)),
    "correctness": (0.35, (products.run, weights.run, logits.run)),
    "kernels": (0.18, (kernels.run,)),
    "heads": (0.17, (heads.run,)),
    "steps": (0.25, (steps.run,)),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 0 if every check passed and nothing raised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("device_check.json"), help="the file of results")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU with Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all sections together")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only: {', '.join(unknown)} is not a section: use {', '.join(SECTIONS)}")
    sizes: Sizes = SMALL if options.small else FULL
    if sizes.device == "cuda" and not environment.has_cuda():
        parser.error("no CUDA device was found: use --small with TRITON_INTERPRET=1 on a CPU")
    report = Report(options.out)
    total = sum(SECTIONS[name][0] for name in wanted)
    for name in wanted:
        share, runs = SECTIONS[name]
        with report.section(name, options.seconds * share / total):
            for run in runs:
                run(report, sizes)
    print(report.summary())
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
