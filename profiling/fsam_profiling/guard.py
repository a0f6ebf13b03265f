"""Regression guard: `fsam profile check`, `make bench-check`, `make baseline`.

`profiling/baseline.json` holds what the compilers make of every kernel, head program and step (`guard_items`). The
guard measures all of it again and fails where a figure worsens by more than `TOLERANCE`. The figures are counts or
compilers' estimates, deterministic on any machine; no clock is read.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_profiling import guard_items, results
from fsam_profiling.guard_items import Figures, Item
from fsam_trainers.console import stdout
from fsam_trainers.files import write_text
from fsam_trainers.tables import show

TOLERANCE = 0.03
BASELINE = Path(__file__).resolve().parent.parent / "baseline.json"
# Less is better for all other figures.
MORE_IS_BETTER = frozenset(("load_bytes", "store_bytes"))

Found = dict[str, Figures]


@dataclass(frozen=True)
class CheckOptions:
    """Compare the figures that need no hardware with the baseline: exit code 1 where one is worse."""

    quick: bool = False
    """only the items that take seconds, as CI does"""
    update: bool = False
    """write the measured figures into the baseline, and print the differences"""
    only: str = ""
    """only items whose name starts with this: 'gpu sm_90', 'tpu v5e step', 'flops'"""
    baseline: Path = BASELINE
    """the file of figures to compare with"""
    json: Path | None = None
    """also write the figures here"""


class Change(NamedTuple):
    """A changed figure; `by` is how much worse it is, relative to the baseline."""

    item: str
    figure: str
    before: float
    after: float
    by: float

    @property
    def worse(self) -> bool:
        return self.by > TOLERANCE

    @property
    def better(self) -> bool:
        return self.by < -TOLERANCE

    def __str__(self) -> str:
        share = f"{100 * self.by:+.1f} % worse" if abs(self.by) < float("inf") else "none before"
        if self.by < 0:
            share = f"{-100 * self.by:.1f} % better"
        return f"{self.item}: {self.figure} {_plain(self.before)} -> {_plain(self.after)} ({share})"


def run(options: CheckOptions) -> int:
    """Measure, compare, print; 0 where nothing worsened, 1 otherwise.

    Raises:
        UserError: where the baseline cannot be read, is of other compilers, or no item is selected.
    """
    chosen = [x for x in guard_items.items() if (x.quick or not options.quick) and x.name.startswith(options.only)]
    if not chosen:
        raise UserError(f"--only: no item's name begins with {options.only!r}; they begin with gpu, tpu or flops")
    whole = not options.quick and not options.only
    before: tuple[dict[str, str], Found] = (
        read(options.baseline) if options.baseline.exists() or not options.update else ({}, {})
    )
    if not options.update:
        same_compilers(chosen, before[0], options.baseline)
    kept, versions = ({}, {}) if whole else (before[1], before[0])
    versions = versions | _versions(chosen)
    # Written after every item, so that an interruption loses none.
    save = (lambda found: write(options.baseline, versions, before[1] | found)) if options.update else None
    found = measure(chosen, save)
    if options.json is not None:
        rows = [{"item": name, **figures} for name, figures in found.items()]
        results.write(options.json, "check", rows, {"baseline": str(options.baseline), "quick": options.quick})
    changes = compare(before[1], found)
    new = missing(before[1], found)
    gone = missing(found, before[1] if whole else {name: of for name, of in before[1].items() if name in found})
    console = stdout()
    if options.update:
        write(options.baseline, versions, kept | found)
        return _report_update(console, options.baseline, changes, new, gone)
    return _report(console, len(found), changes, new, gone)


def measure(items: Iterable[Item], save: Callable[[Found], None] | None = None) -> Found:
    """The figures of every item, sorted by name; `save` receives all figures so far after each item.

    Raises:
        UserError: from a compiler that is missing or cannot be read.
    """
    found: Found = {}
    for item in items:
        print(f"measuring {item.name}", file=sys.stderr)
        found |= item.measure()
        if save is not None:
            save(found)
    return dict(sorted(found.items()))


def compare(before: Found, after: Found) -> list[Change]:
    """Every figure that differs, the worst first."""
    changes = [
        Change(item, figure, before[item][figure], value, worsening(figure, before[item][figure], value))
        for item, figures in after.items()
        for figure, value in figures.items()
        if item in before and figure in before[item] and before[item][figure] != value
    ]
    return sorted(changes, key=lambda change: -change.by)


def missing(these: Found, those: Found) -> list[str]:
    """What only the second have: items, and figures of items that both have."""
    both = {name: of for name, of in those.items() if name in these}
    items = [name for name in those if name not in these]
    return items + [f"{name}: {figure}" for name, of in both.items() for figure in of if figure not in these[name]]


def worsening(figure: str, before: float, after: float) -> float:
    """How much worse a figure is, relative to `before`: negative where it is better, infinite where `before` is 0."""
    worse = before - after if figure in MORE_IS_BETTER else after - before
    if before == 0:
        return float("inf") if worse > 0 else -float("inf")
    return worse / before


def read(path: Path) -> tuple[dict[str, str], Found]:
    """(compiler -> version, figures).

    Raises:
        UserError: for a file that is missing or no baseline.
    """
    try:
        found = json_module.loads(path.read_text(encoding="utf-8"))
        return dict(found["compilers"]), dict(found["figures"])
    except OSError as error:
        raise UserError(
            f"--baseline: {path} cannot be read ({error.strerror}); make one with `make baseline`"
        ) from None
    except (ValueError, KeyError, TypeError):
        why = "is no baseline"
    raise UserError(f"--baseline: {path} {why}; make one with `make baseline`")


def write(path: Path, compilers: dict[str, str], figures: Found) -> None:
    """One line an item, so that a diff of two baselines shows the changed items."""
    lines = [f"  {json_module.dumps(name)}: {json_module.dumps(of)}" for name, of in sorted(figures.items())]
    body = ",\n".join(lines)
    head = json_module.dumps(dict(sorted(compilers.items())))
    write_text(path, f'{{\n "compilers": {head},\n "figures": {{\n{body}\n }}\n}}\n')


def same_compilers(items: Iterable[Item], versions: dict[str, str], path: Path) -> None:
    """Check that the baseline is of the installed compilers.

    Raises:
        UserError: naming both versions of the first that differs.
    """
    for name, version in _versions(items).items():
        if versions.get(name) != version:
            raise UserError(
                f"--baseline: {path.name} is of {name} {versions.get(name)}, and {version} is installed: "
                f"pip install {name}=={versions.get(name)}, or make a new baseline with `make baseline`"
            )


def _versions(items: Iterable[Item]) -> dict[str, str]:
    return {name: str(backends.installed(name)) for item in items for name in item.compilers}


def _report(console: Console, count: int, changes: list[Change], new: list[str], gone: list[str]) -> int:
    worse = [f"worse: {change}" for change in changes if change.worse]
    worse += [f"not in the baseline: {name}" for name in new]
    worse += [f"in the baseline, but no longer measured: {name}" for name in gone]
    for line in worse:
        console.print(line, markup=False, soft_wrap=True)
    for change in changes:
        if change.better:
            console.print(f"better: {change}", markup=False, soft_wrap=True)
    if worse:
        text = (
            f"{len(worse)} figures are not what the baseline allows; if that is intended, make a new one: make baseline"
        )
        console.print(text, markup=False, soft_wrap=True)
        return 1
    console.print(f"{count} items: no figure is worse by more than {TOLERANCE:.0%}", markup=False)
    return 0


def _report_update(console: Console, path: Path, changes: list[Change], new: list[str], gone: list[str]) -> int:
    numbers = (Column(name, justify="right") for name in ("before", "after", "change"))
    table = Table("item", "figure", *numbers, title=str(path))
    for change in changes:
        share = f"{100 * change.by:+.1f} % worse" if change.by > 0 else f"{-100 * change.by:.1f} % better"
        table.add_row(change.item, change.figure, _plain(change.before), _plain(change.after), share)
    if changes:
        show(table)
    for label, names in (("new", new), ("gone", gone)):
        for name in names:
            console.print(f"{label}: {name}", markup=False)
    if not (changes or new or gone):
        console.print("the baseline is unchanged", markup=False)
    return 0


def _plain(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"
