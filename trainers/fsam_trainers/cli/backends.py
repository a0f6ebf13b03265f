"""`fsam backends`: what is installed, what `auto` picks, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fsam_core import UserError, backends
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.files import writable, write_json
from fsam_trainers.tables import show, show_lines


@dataclass(frozen=True)
class Backends:
    """What is installed, what `auto` picks, and why.

    Examples:
        fsam backends
    """

    json: Path | None = None
    """also write the table here"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Backends, arguments, "fsam backends")
    if options.json is not None:
        writable("--json", options.json)
    rows = found()
    if options.json is not None:
        write_json(options.json, rows)
    table = Table("framework", "version", "backend", "in this version", "picked")
    for row in rows:
        marks = ["yes" if row[name] else "" for name in ("built", "picked")]
        table.add_row(row["framework"], escape(row["version"] or "not installed"), row["backend"], *marks)
    show(table)
    show_lines("", *dict.fromkeys(f"{row['framework']}: {row['reason']}" for row in rows if row["reason"]))
    return 0


def found() -> list[dict[str, Any]]:
    """A row for every backend of every framework; of one that cannot be used the reason says why."""
    rows = []
    for framework, names in backends.BACKENDS.items():
        picked, problem, version = None, "", backends.installed(framework)
        try:
            picked = backends.choose(framework)
        except UserError as error:
            problem = str(error)
        for name in names:
            chosen = picked is not None and picked.name == name
            rows.append(
                {
                    "framework": framework,
                    "version": version,
                    "backend": name,
                    "built": backends.built(name),
                    "picked": chosen,
                    "reason": picked.reason if picked and chosen else problem,
                }
            )
    return rows
