"""The tables of docs/results/sharpness.md from the figures of `fsam sharpness --json`.

    python profiling/experiments/sharpness_page.py docs/results/sharpness.md text sharpness.json

What stands between the lines `<!-- WHAT, NAME -->` and `<!-- end -->` of the page is replaced, for WHAT `text` or
`images` and NAME `gradient`, `adam` (shares along these directions) and `end of the runs` (eigenvalues and traces).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from markdown_tables import markdown

Row = dict[str, Any]
LABELS = {"adamw": "AdamW", "sam": "SAM", "precond-functional-sam": "functional"}


def shares_table(rows: list[Row], direction: str) -> str:
    """A line a checkpoint, with the shares of each run at radius 0 and at its own: logits / function."""
    shares = [x for x in rows if x["what"] == "shares" and x["direction"] == direction]
    columns = list(dict.fromkeys((x["method"], x["radius"]) for x in shares))
    cells = {(x["step"], x["method"], x["radius"]): x for x in shares}
    head = ["steps", *(f"{LABELS[method]} at {radius:g}" for method, radius in columns)]
    lines = []
    for step in sorted({x["step"] for x in shares}):
        found = [cells.get((step, *column)) for column in columns]
        lines.append([str(step), *(f"{x['gauss_newton']:.2g} / {x['functional']:.2g}" if x else "" for x in found)])
    return markdown(head, lines)


def end_table(rows: list[Row]) -> str:
    """A line a matrix of each run's last checkpoint: the largest eigenvalues, the smallest, the trace."""
    kinds = {kind: {(x["method"], x["matrix"]): x for x in rows if x["what"] == kind} for kind in ("spectrum", "trace")}
    count = min(len(x["eigenvalues"]) for x in kinds["spectrum"].values())
    head = ["run", "matrix", "λmax", *(f"λ{i}" for i in range(2, count + 1)), "λmin", "trace ± standard error"]
    lines = []
    for (method, matrix), x in kinds["spectrum"].items():
        trace = kinds["trace"][method, matrix]
        values = [*x["eigenvalues"][:count], x["smallest"]]
        numbers = [*(f"{value:.3g}" for value in values), f"{trace['trace']:.0f} ± {trace['error']:.0f}"]
        lines.append([LABELS[method], matrix, *numbers])
    return markdown(head, lines)


def main(page: Path, what: str, figures: Path) -> None:
    """Replace the tables of the page that are of `what`."""
    rows, text = json.loads(figures.read_text())["rows"], page.read_text()
    for name, table in (
        ("gradient", shares_table(rows, "gradient")),
        ("adam", shares_table(rows, "adam")),
        ("end of the runs", end_table(rows)),
    ):
        start = f"<!-- {what}, {name} -->\n"
        filled = f"{start}\n{table}\n\n<!-- end -->"
        text, count = re.subn(f"{re.escape(start)}.*?<!-- end -->", lambda _: filled, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} must have {start.strip()} … <!-- end --> once")
    page.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
