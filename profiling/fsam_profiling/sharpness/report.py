"""The tables of `fsam sharpness`, for the terminal and for one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fsam_trainers.page import Section

Row = dict[str, Any]
SHARES = ("run", "step", "along", "at", "logits", "function", "cross", "cosine", "loss")
ENDS = ("run", "step", "matrix", "largest", "2nd", "smallest", "trace", "± error")
NOTES = (
    "logits: ‖G d‖² / ‖H d‖²; function: ‖N d‖² / ‖H d‖²; cross: what is missing from 1. Dividing by ‖H d‖² is this "
    "project's choice.",
    "at 0: exact products. at ρ > 0: the differences of the methods' gradients at that radius, divided by it.",
)


def share_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The lines of the table of shares."""
    return [
        [
            row["run"],
            "–" if row["step"] is None else str(row["step"]),
            row["direction"],
            f"{row['radius']:g}",
            *(f"{row[name]:.2g}" for name in ("gauss_newton", "functional", "cross")),
            f"{row['cosine']:.2f}",
            f"{row['loss']:.3f}",
        ]
        for row in rows
        if row["what"] == "shares"
    ]


def end_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The lines of the table of eigenvalues and traces; ≈ where an eigenvalue has not converged."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["what"] in ("spectrum", "trace"):
            found.setdefault((row["run"], row["step"], row["matrix"]), {})[row["what"]] = row
    lines = []
    for (run, step, matrix), of in found.items():
        spectrum, trace = of.get("spectrum"), of.get("trace")
        values = ["–"] * 3
        if spectrum:
            mark = "" if spectrum["converged"] else "≈"
            values = [f"{mark}{x:.4g}" for x in (*spectrum["eigenvalues"][:2], spectrum["smallest"])]
        traces = [f"{trace['trace']:.4g}", f"{trace['error']:.2g}"] if trace else ["–"] * 2
        lines.append([run, "–" if step is None else str(step), matrix, *values, *traces])
    return lines


def sections(rows: Sequence[Row], command: str, facts: dict[str, Any]) -> list[Section]:
    """The page's sections.

    Raises:
        UserError: where matplotlib is not installed.
    """
    from fsam_profiling.sharpness import plots

    kind = lambda what: [row for row in rows if row["what"] == what]
    caption = "Solid: the logits' share, dotted: the function's; filled marks at radius 0, open ones at ρ"
    pictures = [(caption, plots.shares(kind("shares")))]
    found = [Section("Shares of H d", SHARES, share_cells(rows), command, facts, pictures, NOTES)]
    pictures = []
    if kind("density"):
        pictures.append(("Density of eigenvalues", plots.densities(kind("density"))))
    if kind("line"):
        pictures.append(("Loss along the directions", plots.lines(kind("line"))))
    pictures += [(f"Loss over the plane of two eigenvectors: {row['run']}", plots.plane(row)) for row in kind("plane")]
    cells = end_cells(rows)
    if cells or pictures:
        notes = (
            "H: the Hessian; G: the Gauss–Newton matrix. Traces are Hutch++ estimates with their standard errors.",
        )
        found.append(Section("At the last checkpoint", ENDS, cells, command, {}, pictures, notes))
    return found
