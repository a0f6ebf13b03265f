"""The results of the study, as JSON, a page with tables, and plots.

    python profiling/experiments/study_report.py --study runs/study --out docs/results

Differences are between runs of the same seed, whose batches and initial weights are the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import study_plots
from fsam_core import UserError
from fsam_profiling import results
from fsam_trainers.files import write_json
from study import BEST_RIVAL, SAME_TIME, VARIANTS, Study

COMMANDS = "make study"


@dataclass(frozen=True)
class StudyReportOptions:
    """Tables, plots and figures of a finished study."""

    study: Path = Path("runs/study")
    """folder of the runs"""
    out: Path = Path("docs/results")
    """folder that receives study.json, study.md and study-*.png"""


def main() -> None:
    """The command."""
    options = tyro.cli(StudyReportOptions, prog="python profiling/experiments/study_report.py")
    try:
        write(options)
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)


def write(options: StudyReportOptions) -> None:
    """Write all three.

    Raises:
        UserError: for a study without results, or a disk that refuses.
    """
    found = gathered(options.study)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "study.json", found)
    (options.out / "study.md").write_text(page(found), encoding="utf-8")
    for name, draw in (
        ("losses", study_plots.losses),
        ("curves", study_plots.curves),
        ("cosines", study_plots.cosines),
    ):
        draw(found).savefig(options.out / f"study-{name}.png", dpi=150)


def gathered(folder: Path) -> dict[str, Any]:
    """The content of study.json: costs, tuned values, and for each row its losses by seed and as means."""
    of = lambda name, made_by: _read(folder / name, made_by)
    runs = of("results.json", "study")
    regimes = {}
    for name, regime in runs["regimes"].items():
        rows = regime["rows"]
        if not rows:
            continue
        tuned = regime["tuned"]
        summaries = {label: _summary(row, rows["AdamW"]) for label, row in rows.items()}
        for label, row in rows.items():
            if label.endswith(BEST_RIVAL):
                summaries[label]["to_rival"] = _difference(row, rows[tuned["rival_row"]])
        regimes[name] = {"tuned": tuned, "data": rows["AdamW"][0]["data"]["description"], "rows": summaries}
    cosines = of("cosines.json", "study_cosines")
    # Momentum and the previous gradient are 0 before the first step, and so is their correction: it has no cosine.
    cosines["rows"] = [row for row in cosines["rows"] if row["cosine"] is not None]
    return {
        "command": COMMANDS,
        "machine": results.machine(),
        # Without the paths of the machine that made it.
        "study": {name: value for name, value in runs["study"].items() if name not in ("out", "done")},
        "complete": runs["complete"],
        "variants": {name: {"method": method, **changes} for name, (method, changes) in VARIANTS.items()},
        "costs": of("costs.json", "study"),
        "regimes": regimes,
        "cosines": cosines,
    }


def _read(path: Path, made_by: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--study: {path} is not there; python profiling/experiments/{made_by}.py makes it") from None


def _summary(row: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [point[0] for point in row[0]["curve"]]
    return {
        "steps": row[0]["steps"],
        "val_loss": [run["val_loss"] for run in row],
        "best_val_loss": [run["best_val_loss"] for run in row],
        "best_step": [run["best_step"] for run in row],
        "skipped_steps": sum(run["skipped_steps"] for run in row),
        "curve": list(zip(steps, np.mean([[y for _, y in run["curve"]] for run in row], axis=0).tolist(), strict=True)),
        "to_adamw": _difference(row, adamw),
    }


def _difference(row: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The difference for each seed, at the end and of the best evaluations."""
    of = lambda name: [a[name] - b[name] for a, b in zip(row, other, strict=True)]
    return {"val_loss": of("val_loss"), "best_val_loss": of("best_val_loss")}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """Markdown: how it was measured, then a table for each regime and one of the corrections."""
    study, machine = Study(**found["study"]), found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "processor")
    parts = [
        "# What each saving loses",
        f"Made by `{found['command']}`; do not edit. {machine['processor']}, {versions}.",
        f"Preset `{study.preset}`, {study.steps} steps of {study.batch} sequences, {study.seeds} seeds. Validation "
        "losses are means over the seeds. A difference is between runs of the same seed: mean, minimum and maximum; "
        'below 0 is better. "at AdamW\'s time" means fewer steps, in proportion to the cost of a step, with a schedule '
        "of that length. Cost: median of 40 interleaved steps and 20th–80th percentile.",
        "![differences](study-losses.png)",
    ]
    if not found["complete"]:
        parts.insert(1, "**Not all of the plan is trained yet: a dash stands for what is missing.**")
    for name, regime in found["regimes"].items():
        parts += [f"## {name[0].upper()}{name[1:]}", _tuning(regime), *_table(found, regime)]
    parts += [
        "![curves](study-curves.png)",
        "## Corrections along a run of the exact method",
        "Cosine with the exact correction, and length relative to it, on the batches that the run trains on: mean over "
        "the run's points, minimum and maximum.",
        _corrections(found["cosines"]["rows"]),
        "![cosines](study-cosines.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _tuning(regime: dict[str, Any]) -> str:
    swept = regime["tuned"]["swept"]
    rows = [
        f"| {label} | " + ", ".join(f"{value}: {loss:.3f}" for value, loss in values.items()) + " |"
        for label, values in swept.items()
    ]
    return "\n".join(
        [f"{regime['data']}. Tuned on the first seed, validation loss at the end:", "", "| | |", "|---|---|", *rows]
    )


def _table(found: dict[str, Any], regime: dict[str, Any]) -> list[str]:
    rows, costs = regime["rows"], found["costs"]
    stacked = any(label.endswith(BEST_RIVAL) for label in rows)
    head = ["", "x AdamW", "at the end", "to AdamW", "best (at step)", "at AdamW's time, to AdamW"]
    head += [f"on top of {regime['tuned']['rival_row']}, to that alone"] * stacked
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, row in rows.items():
        if " | " in label:
            continue
        cost = costs.get(label)
        best, at = np.mean(row["best_val_loss"]), np.mean(row["best_step"])
        cells = [
            label,
            "1"
            if cost is None or cost["ratio"] == 1
            else "{ratio:.2f} ({ratio_p20:.2f}–{ratio_p80:.2f})".format(**cost),
            f"{np.mean(row['val_loss']):.3f}",
            _spread(row["to_adamw"]["val_loss"]),
            f"{best:.3f} ({at:.0f})",
            _spread(rows.get(f"{label} | {SAME_TIME}", {}).get("to_adamw", {}).get("val_loss")),
        ]
        if stacked:
            cells.append(_spread(rows.get(f"{label} | {BEST_RIVAL}", {}).get("to_rival", {}).get("val_loss")))
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _spread(values: list[float] | None) -> str:
    if values is None or not any(values):
        return "–" if values is None else "0"
    return f"{np.mean(values):+.3f} ({min(values):+.3f} … {max(values):+.3f})"


def _corrections(rows: list[dict[str, Any]]) -> str:
    lines = ["| | cosine | length |", "|---|---|---|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        of = lambda what: [row[what] for row in rows if row["variant"] == name]
        text = lambda x: f"{np.mean(x):.2f} ({min(x):.2f} … {max(x):.2f})"
        lines.append(f"| {name} | {text(of('cosine'))} | {text(of('length'))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
