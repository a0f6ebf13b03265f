"""The page of the study: tables and plots of whatever runs there are, and how many are missing.

    python profiling/experiments/study_report.py

Differences are between runs of the same seed, which have the same initial weights and batches. Their mean is given with
half of its 95 % interval by Student's t; where that holds 0, there is no difference to speak of.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import paired
import study_plots
from fsam_core import UserError
from fsam_profiling import results
from fsam_trainers import metrics
from fsam_trainers import page as html
from fsam_trainers.files import write_text
from fsam_trainers.plots import as_svg
from markdown_tables import markdown
from study_plan import ADAMW, DECAY, LEADING_SEEDS, REGIMES, SAME_PRICE, Entry, Regime, cost_ratio, entries, settings_of

COMMAND = "make study"
AFTER = (
    "After the run: `old_loss` is the loss on the base's text; `4 bits` and `3 bits` of weights rounded by channel, "
    "`noise` of weights with noise of a tenth of each matrix's RMS; `λmax` is the Hessian's largest eigenvalue; "
    "`forgetting` the loss on the old text once fine-tuning on prose has learned as much as from AdamW's weights."
)
HOW = (
    "Losses are means over the seeds. A difference is that of runs of the same seed, ± half of its 95 % interval by "
    "Student's t. Below 0 is better, and where the interval holds 0, or the mean rounds to 0, there is no difference. "
    "Every option is tuned by successive halving with a seed of its own, and ρ once more on top of the weight decay. "
    "“x AdamW” is the number of operations by the cost model; “equal time” has as many fewer steps. Texts are split "
    "as streams are, so no loss here can be compared with one on an older version of this page."
)
BEST = (
    "The best row of each regime, as its difference to AdamW in the loss at the end, and “none” where no row is "
    "better. Usual means are weight decay, dropout, averages, noise, longer training and training at 4 bits. At equal "
    "time a row that costs more has as many fewer steps, which may help by themselves, as AdamW's own rows with fewer "
    "steps show; where such runs were not trained, only rows at AdamW's price count. The best of many rows looks "
    "better than it is."
)
Line = dict[str, Any]
Rows = dict[str, dict[int, Line]]
"""Label -> seed -> the run's line."""
Table = tuple[list[str], list[list[str]]]


class Difference(NamedTuple):
    """The mean of paired differences, half of its 95 % interval, infinity of a single seed, and how many there are."""

    mean: float
    half: float
    seeds: int

    @property
    def is_better(self) -> bool:
        return paired.verdict(self.mean, self.half) == "better"

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} ± {self.half:.3f}, {paired.verdict(self.mean, self.half)}"


def main() -> None:
    """The command."""
    try:
        write(Path("docs/results"), Path("runs/study"))
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)


def write(results_folder: Path, out: Path) -> None:
    """Write study.md and the plots from the files in RESULTS/study, and one page of all, OUT/study.html.

    Raises:
        UserError: for a disk that refuses.
    """
    runs = results_folder / "study"
    found = {name: rows for name in REGIMES if (rows := rows_of(runs, name))}
    results_folder.mkdir(parents=True, exist_ok=True)
    (results_folder / "study.md").write_text(page(found), encoding="utf-8")
    drawn = {name: study_plots.losses(REGIMES[name].title, table_of(name, rows)) for name, rows in found.items()}
    for name, figure in drawn.items():
        figure.savefig(runs / f"{name}.png", dpi=150)
    first = html.Section("The best row of each regime", *summary(found), COMMAND, notes=[BEST])
    sections = [_section(name, found[name], figure) for name, figure in drawn.items()]
    write_text(out / "study.html", html.render("When to use what", [first, *sections]))


def rows_of(runs: Path, name: str) -> Rows:
    """The finished runs of a regime: of the data that most of them have, the last of each row and seed."""
    path = runs / f"{name}.jsonl"
    lines = [x for x in metrics.read(path) if x["val_loss"] is not None]
    lines = [x for x in lines if not x["row"].endswith("(tuning)")]
    known = [x["data"] for x in lines]
    rows: Rows = {}
    for line in (x for x in lines if x["data"] == max(known, key=known.count)):
        rows.setdefault(line["row"], {})[line["seed"]] = line
    return rows


def missing(runs: Path, name: str) -> int:
    """How many runs of the regime's rows there are not yet."""
    return _missing(name, rows_of(runs, name))


def _missing(name: str, rows: Rows) -> int:
    regime = REGIMES[name]
    return sum(seed not in rows.get(x.label, {}) for x in entries(regime) for seed in regime.seeds_of(x.label))


def difference(rows: Rows, label: str, other: str, figure: str = "val_loss") -> Difference | None:
    """Of one row to another, over the seeds that both have."""
    mine, theirs = rows.get(label, {}), rows.get(other, {})
    seeds = [seed for seed in sorted(mine) if seed in theirs]
    if not seeds:
        return None
    return Difference(*paired.difference(*([of[seed][figure] for seed in seeds] for of in (mine, theirs))), len(seeds))


class TableRow(NamedTuple):
    """One row of a regime's table."""

    label: str
    tuned: str
    cost: float
    loss: float
    best: float
    to_adamw: Difference | None
    to_decay: Difference | None
    equal_time: Difference | None
    rounded: Difference | None


def table_of(name: str, rows: Rows) -> list[TableRow]:
    """The rows that have runs."""
    regime, found = REGIMES[name], []
    for entry in entries(regime):
        label = entry.label
        if label not in rows or entry.on_decay or entry.equal_time:
            continue
        # Of the seeds that all rows have, so that the column can be compared.
        own = [line for seed, line in rows[label].items() if seed < regime.seeds]
        mean = lambda figure, own=own: float(np.mean([line[figure] for line in own]))
        on_decay = difference(rows, f"{label}, on decay", DECAY)
        timed = difference(rows, f"{label}, equal time", ADAMW)
        to_adamw = None if label == ADAMW else difference(rows, label, ADAMW)
        costs = tuned_of(entry, rows[label]), relative_cost(regime, entry)
        ends = mean("val_loss"), mean("best_val_loss")
        rounded = difference(rows, label, ADAMW, "4 bits") if regime.late and label != ADAMW else None
        found.append(TableRow(label, *costs, *ends, to_adamw, on_decay, timed, rounded))
    return found


def tuned_of(entry: Entry, row: dict[int, Line]) -> str:
    """The value that tuning chose, "" where nothing is tuned."""
    known = [line["settings"] for line in row.values() if entry.row.tunes in line.get("settings", {})]
    value = known[0][entry.row.tunes] if known else None
    return "" if value is None else f"{entry.row.tunes.replace('_', ' ')} {value:.4g}"


def relative_cost(regime: Regime, entry: Entry) -> float:
    """Operations of a run relative to AdamW's."""
    one = settings_of(regime, entry.row, {}, 0)
    return cost_ratio(one) * one.steps / regime.steps


def summary(found: dict[str, Rows]) -> Table:
    """For each regime with runs its best row in four respects, "none" where no row is better."""
    lines = []
    for name, rows in found.items():
        regime, known = REGIMES[name], table_of(name, rows)
        of = lambda row, late=bool(regime.late): row.rounded if late else row.to_adamw
        timed = lambda row, of=of: of(row) if row.cost <= SAME_PRICE else row.equal_time
        ours = [x for x in known if not _is_usual(regime, x.label)]
        what = ", loss after rounding to 4 bits" if regime.late else ""
        what += " (unfinished)" if _missing(name, rows) else ""
        cells = [_best((x, of(x)) for x in known if x not in ours)]
        cells += [_best((x, of(x)) for x in ours), _best((x, timed(x)) for x in ours)]
        cells += [_best((x, x.to_decay) for x in ours) if regime.on_decay else "–"]
        lines.append([regime.title + what, *cells])
    return ["", "usual means", "sharpness-aware, equal steps", "equal time", "on tuned decay"], lines


def _is_usual(regime: Regime, label: str) -> bool:
    """Whether a row has no ascent along a gradient: AdamW's own options, noise, training at 4 bits."""
    row = (regime.rivals | regime.alone)[label]
    return row.method == "adamw" or str(row.fixed.get("ascent")).startswith(("random", "quantised"))


def _best(rows: Iterable[tuple[TableRow, Difference | None]]) -> str:
    better = [(x.mean, f"{row.label}: {x.mean:+.3f} ± {x.half:.3f}") for row, x in rows if x and x.is_better]
    return min(better)[1] if better else "none"


# --- the page ---------------------------------------------------------------------------------------------------------


def page(found: dict[str, Rows]) -> str:
    """Markdown: how it was measured, then a table for each regime that has runs."""
    machine = results.machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "processor")
    parts = [
        "# When to use what",
        f"Made by `{COMMAND}`; do not edit. {machine['processor']}, {versions}.\nEach finished "
        "run is a line of [study/](study/), and the command resumes from them. Small models on text that any machine\n"
        "has.",
        textwrap.fill(HOW, 119),
        markdown(*summary(found)),
        textwrap.fill(BEST, 119),
    ]
    for name, regime in REGIMES.items():
        count = _missing(name, found.get(name, {}))
        total = sum(len(regime.seeds_of(entry.label)) for entry in entries(regime))
        parts.append(f"## {regime.title}")
        if count:
            parts.append(
                f"**{count} of {total} runs are missing**: `python profiling/experiments/study.py --regimes {name}`."
            )
        if name in found:
            table = markdown(*_table(name, found[name]))
            parts += [_sizes(regime, found[name]), table, f"![{name}](study/{name}.png)"]
            if regime.base:
                parts += [textwrap.fill(AFTER, 119), markdown(*_afterwards(found[name]))]
    return "\n\n".join(parts) + "\n"


def _sizes(regime: Regime, rows: Rows) -> str:
    """What its runs have in common."""
    size = f"{regime.model.parameters / 1e3:,.0f}k parameters, {regime.steps:,} steps of {regime.batch} sequences"
    more = f" ({LEADING_SEEDS} in the differences of {len(regime.leading)} rows)" if regime.leading else ""
    tuned = f" ρ tuned in {regime.tuning_rho * regime.steps:,.0f} steps." if regime.tuning_rho < 1 else ""
    return f"{size}, {regime.seeds} seeds{more}.{tuned}" + (f" Text: {regime.data}." if rows.get(ADAMW) else "")


def _section(name: str, rows: Rows, figure: Any) -> html.Section:
    """A regime on the HTML page, with what comes after its runs as notes."""
    regime, notes = REGIMES[name], [HOW]
    if regime.base:
        (_, *names), lines = _afterwards(rows)
        notes += [
            f"{line[0]}: {'; '.join(f'{x} {y}' for x, y in zip(names, line[1:], strict=True))}." for line in lines
        ]
    facts = {"runs": _sizes(regime, rows), "missing": _missing(name, rows)}
    command = f"python profiling/experiments/study.py --regimes {name}"
    return html.Section(regime.title, *_table(name, rows), command, facts, [("Differences", as_svg(figure))], notes)


def _table(name: str, rows: Rows) -> Table:
    """The headings, and the cells of each row."""
    stacked, timed = bool(REGIMES[name].on_decay), bool(REGIMES[name].equal_time)
    head = ["", "tuned", "x AdamW", "loss at the end", "best", "to AdamW"]
    head += ["on decay, to that alone"] * stacked + ["equal time, to AdamW"] * timed
    lines = []
    for row in table_of(name, rows):
        cells = [row.label, row.tuned, f"{row.cost:.2f}", f"{row.loss:.3f}", f"{row.best:.3f}", _text(row.to_adamw)]
        lines.append(cells + [_text(row.to_decay)] * stacked + [_text(row.equal_time)] * timed)
    return head, lines


def _afterwards(rows: Rows) -> Table:
    """Differences to AdamW in what a regime looks at after the run: old text, rounding, curvature, forgetting."""
    first = next(iter(rows.get(ADAMW, next(iter(rows.values()))).values()))
    for of in rows.values():
        for seed, line in of.items():
            line["forgetting"] = forgetting(line, rows.get(ADAMW, {}).get(seed))
    names = [x for x in ("old_loss", "4 bits", "3 bits", "noise", "λmax", "forgetting") if first.get(x) is not None]
    cells = []
    for label in rows:
        if label == ADAMW:
            own = [np.mean([line[name] for line in rows[label].values()]) for name in names]
            cells.append([f"{label} itself", *(f"{mean:.3f}" for mean in own)])
        else:
            cells.append([label, *(_text(difference(rows, label, ADAMW, name)) for name in names)])
    return ["to AdamW", *names], cells


def forgetting(line: Line, adamw: Line | None) -> float | None:
    """Loss on the old text where fine-tuning has learned as much of the new as AdamW's has at its middle rate."""
    if adamw is None or "fine_tuning" not in line:
        return None
    goal = adamw["fine_tuning"][len(adamw["fine_tuning"]) // 2][0]
    learned, old = np.array(sorted(line["fine_tuning"])).T
    return float(np.interp(goal, learned, old))


def _text(x: Difference | None) -> str:
    return "–" if x is None else str(x)


if __name__ == "__main__":
    main()
