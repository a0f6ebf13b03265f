"""The options of `fsam sharpness`, and the order of its work."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from fsam_core import UserError, backends
from fsam_profiling import results
from fsam_profiling.sharpness import report
from fsam_profiling.sharpness.measure import Row, Wanted, measure
from fsam_profiling.sharpness.subjects import ARGUMENT, Curvatures, find, subjects, windows
from fsam_trainers import page
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.console import Console, command_line
from fsam_trainers.files import writable, write_text
from fsam_trainers.tables import show, show_lines

DIRECTIONS = ("gradient", "adam")


@dataclass(frozen=True)
class Sharpness:
    """How much of the sharpness is that of the logits, and how much the function's; eigenvalues, traces, landscapes.

    Examples:
        fsam sharpness runs/a runs/b
        fsam sharpness runs/a --checkpoints last --eigen 3 --trace --density --landscape 2d
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """runs' folders (all their checkpoints), RUN@STEP, folders of safetensors, or hf:NAME"""
    data: str | None = None
    """a text or a set of images, as of fsam train (default: the first run's); its held-out part is read"""
    tokens: int = 4096
    """of the text, that the loss is a mean of; of images patches"""
    tokenizer: Path | None = None
    """a tokenizer.json or a SentencePiece .model, for models without their own"""
    directions: str = "gradient,adam"
    """the directions d of the shares: gradient, adam (preconditioned, as AdamW's next step)"""
    rho: float | None = None
    """radius at which the shares are also shown (default: the run's own, else 0.5)"""
    checkpoints: Literal["all", "last"] = "all"
    """of each run"""
    eigen: int = 0
    """so many of the largest eigenvalues of H and G at the last checkpoint, and the smallest; 0 for none"""
    trace: bool = False
    """the traces of H and G there"""
    trace_products: int = 60
    """products for each trace"""
    density: bool = False
    """the densities of their eigenvalues there"""
    landscape: Literal["none", "1d", "2d"] = "none"
    """the loss there: along the directions, or over the plane of the top two eigenvectors of H"""
    products: Literal["exact", "difference"] = "exact"
    """difference: of gradients, for a model that cannot be differentiated twice"""
    dtype: Literal["float32", "float64"] = "float32"
    """what is computed in"""
    framework: Literal["jax", "torch"] | None = None
    """jax or torch (default: the run's own)"""
    seed: int = 0
    """of the random vectors"""
    out: Path = Path("sharpness.html")
    """the report"""
    plot: Path | None = None
    """also write the picture of the shares here, as SVG"""
    json: Path | None = None
    """also write the figures here"""
    quiet: bool = False
    """no progress on stderr"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: for bad options, and what cannot be read or measured.
    """
    options = parsed(Sharpness, arguments, "fsam sharpness")
    wanted = _wanted(options)
    backends.require("matplotlib", "jinja2")
    writable("--out", options.out)
    for name, path in (("--plot", options.plot), ("--json", options.json)):
        if path is not None:
            writable(name, path)
    rows: list[Row] = []
    stopped = False
    try:
        _measure(options, wanted, rows)
    except KeyboardInterrupt:
        stopped = True
    if rows:
        names = ("tokens", "dtype", "products")
        facts = {"data": options.data or "that of the first run", **{name: getattr(options, name) for name in names}}
        if options.json is not None:
            results.write(options.json, "sharpness", rows, facts)
        machine = ", ".join(f"{name} {value}" for name, value in results.machine().items())
        found = report.sections(rows, command_line(), facts | {"machine": machine})
        write_text(options.out, page.render("fsam sharpness", found))
        if options.plot is not None:
            write_text(options.plot, found[0].pictures[0][1])
        _print(rows, options.out)
    if stopped:
        print(f"fsam: interrupted; {len(rows)} rows were finished", file=sys.stderr)
    return 130 if stopped else 0


def _wanted(options: Sharpness) -> Wanted:
    if not options.runs:
        raise UserError(f"{ARGUMENT}: give at least one: a run's folder, RUN@STEP, or a model's folder")
    names = tuple(dict.fromkeys(name for name in options.directions.split(",") if name))
    unknown = [name for name in names if name not in DIRECTIONS]
    if unknown or not names:
        raise UserError(f"--directions must be some of {', '.join(DIRECTIONS)}, got {options.directions!r}")
    for name, value, least in (
        ("--tokens", options.tokens, 1),
        ("--eigen", options.eigen, 0),
        ("--trace-products", options.trace_products, 6),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if options.rho is not None and not 0 < options.rho < float("inf"):
        raise UserError(f"--rho must be a finite number > 0, got {options.rho}")
    return Wanted(
        names,
        options.rho,
        options.eigen,
        options.trace_products if options.trace else 0,
        options.density,
        options.landscape,
        seed=options.seed,
    )


def _measure(options: Sharpness, wanted: Wanted, rows: list[Row]) -> None:
    """Add the rows of everything to `rows`, each as soon as it is there."""
    console = Console(options.quiet)
    sources = find(options.runs)
    tokens = windows(sources, options.data, options.tokenizer, options.tokens)
    curvatures = Curvatures(tokens, options.dtype, options.products)
    counts = [1 if options.checkpoints == "last" else max(1, len(source.folders)) for source in sources]
    total = sum(wanted.pieces(False) * (count - 1) + wanted.pieces(True) for count in counts)
    with console.counting("measuring", total) as tick:
        for source, count in zip(sources, counts, strict=True):
            for i, subject in enumerate(subjects(source, options.framework, options.checkpoints)):
                if not console.rich.is_terminal:
                    console.say(f"measuring {subject.label}")
                with curvatures.of(subject) as curvature:
                    for row in measure(subject, curvature, wanted, i + 1 == count, tick):
                        rows.append(row)  # one by one, so that an interruption loses none


def _print(rows: list[Row], out: Path) -> None:
    for headings, cells in ((report.SHARES, report.share_cells(rows)), (report.ENDS, report.end_cells(rows))):
        if not cells:
            continue
        table = Table()
        for name in headings:
            table.add_column(name, justify="left" if name in ("run", "along", "matrix") else "right")
        for line in cells:
            table.add_row(*map(escape, line))
        show(table)
    show_lines(f"report: {out}")
