"""The rows of every table of steps: methods, and savings of the recommended method."""

from __future__ import annotations

from typing import Any

from fsam_core import NAMES, UserError
from fsam_trainers.config import Framework

# Savings of METHOD: (name in the table, changed settings).
METHOD = "precond-functional-sam"
SPLIT: dict[str, Any] = {"form": "split", "ascent": "rest"}
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("recompute", {"cotangent": "recompute"}),
    ("keep", {"cotangent": "keep"}),
    ("cut hidden", {"cut": "hidden"}),
    ("1/2", {"correction_fraction": 0.5}),
    ("1/4", {"correction_fraction": 0.25}),
    ("1/8", {"correction_fraction": 0.125}),
    ("1/8 + cut hidden", {"correction_fraction": 0.125, "cut": "hidden"}),
    ("split 1/2", SPLIT | {"correction_fraction": 0.5}),
    ("split 1/4", SPLIT | {"correction_fraction": 0.25}),
    ("top:2", {"scope": "top:2"}),
    ("ascent 1/4", {"ascent": "part", "ascent_fraction": 0.25}),
    ("momentum", {"ascent": "momentum"}),
    ("every 4", {"every": 4}),
    ("every 4 reused", {"every": 4, "between": "reuse"}),
    ("start 0.9", {"start": 0.9}),
    ("no correction", {"probability": 0.0}),
)
OF_SAM = (("precond-sam", "sam split 1/2", SPLIT | {"correction_fraction": 0.5}),)
SCHEDULES = {"every", "start", "probability"}  # settings that do not change a corrected step
COMMON = ("adamw", "sam", METHOD, "1/4", "1/8", "1/8 + cut hidden")


def table_rows(only: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, saving, changed settings) of each requested row; all rows for "" and "all", AdamW always.

    Raises:
        UserError: for an unknown row.
    """
    every = [*((name, "", {}) for name in NAMES), *((METHOD, *saving) for saving in SAVINGS), *OF_SAM]
    known = [saving or method for method, saving, _ in every]
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    if "common" in wanted:
        wanted = wanted - {"common"} | set(COMMON)
    if "all" in wanted:
        wanted = set()
    if unknown := sorted(wanted - set(known)):
        raise UserError(f"--only: {', '.join(unknown)} is no row; use all, common, or some of {', '.join(known)}")
    return [row for row, name in zip(every, known, strict=True) if not wanted or name in wanted or name == "adamw"]


def programs(only: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The requested rows that are a program of their own; the corrected steps of a schedule are not.

    Raises:
        UserError: as `table_rows`, and for a schedule requested by name.
    """
    schedules = {saving for saving, changes in SAVINGS if not set(changes) - SCHEDULES}
    if named := sorted(schedules & {name.strip() for name in only.split(",")}):
        text = ", ".join(named)
        raise UserError(f"--only: {text} is a schedule, with steps as of adamw and of {METHOD}: ask for those")
    return [row for row in table_rows(only) if row[1] not in schedules]


def frameworks_and_sizes(options: Any) -> tuple[tuple[Framework, ...], dict[str, Any]]:
    """The frameworks of a `StepOptions` or `TraceOptions`, and the settings that all its rows share."""
    frameworks: tuple[Framework, ...] = ("jax", "torch") if options.framework == "both" else (options.framework,)
    return frameworks, {name: getattr(options, name) for name in ("batch", "seq_len", "vocab_size", "dtype")}
