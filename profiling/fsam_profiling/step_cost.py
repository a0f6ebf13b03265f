"""Step time of every method in both frameworks, taken turn about in one process: `fsam profile step`, `make bench`.

Each row's ratio is to AdamW in the same framework, and the last column sets the two frameworks against each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console as Rich
from rich.table import Table

from fsam_core import NAMES, UserError
from fsam_profiling.peak import peak_bytes
from fsam_trainers import cost
from fsam_trainers.console import Console
from fsam_trainers.files import write_json
from fsam_trainers.presets import preset
from fsam_trainers.settings import Framework, Settings

# Savings, each for the method that is meant to be used: (what the table calls it, changes of the settings).
METHOD = "precond-functional-sam"
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("recompute", {"cotangent": "recompute"}),
    ("keep", {"cotangent": "keep"}),
    ("cut hidden", {"cut": "hidden"}),
    ("1/4", {"correction_fraction": 0.25}),
    ("1/8", {"correction_fraction": 0.125}),
    ("1/8 + cut hidden", {"correction_fraction": 0.125, "cut": "hidden"}),
)


@dataclass(frozen=True)
class Options:
    """Time one optimizer step of each method on random tokens."""

    preset: str = "tiny"
    """model size, as in `fsam train`"""
    batch: int | None = None
    """sequences a step"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary"""
    repeats: int = 15
    """steps of each variant"""
    only: str = ""
    """some of the rows, by method or saving: 'sam,1/8,cut hidden'; AdamW is always there, all models exist at once"""
    framework: Literal["both", "jax", "torch"] = "both"
    """jax, torch, or both beside each other"""
    peak: bool = False
    """also the peak memory of a step beside weights and moments, each variant in a process of its own"""
    json: Path | None = None
    """also write the figures here"""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row a framework and variant: step_ms, ratio to AdamW with its spread, ratio to PyTorch's same variant."""
    size = preset(options.preset)
    model = size.model(seq_len=options.seq_len, vocab_size=options.vocab_size, tied=True, dropout=0.0)
    torch = Settings(framework="torch", method="adamw", model=model, steps=1000, batch=options.batch or size.batch)
    torch = dataclasses.replace(torch, learning_rate=size.learning_rate, rho=size.rho)
    frameworks: tuple[Framework, ...] = ("jax", "torch") if options.framework == "both" else (options.framework,)
    variants = {
        (framework, method, saving): dataclasses.replace(torch, framework=framework, method=method, **changes)
        for method, saving, changes in _rows(options.only)
        for framework in frameworks
    }
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (torch.batch, model.seq_len + 1), dtype=np.int32)
    with Console().counting("timing", (options.repeats + 2) * len(variants)) as tick:
        times = cost.interleaved(variants, tokens, options.repeats, tick)
    rows = []
    for (framework, method, saving), milliseconds in times.items():
        to_adamw = cost.against(milliseconds, times[framework, "adamw", ""])
        to_torch = cost.against(milliseconds, times.get(("torch", method, saving), milliseconds))
        grown = peak_bytes(variants[framework, method, saving], tokens) if options.peak else None
        rows.append(
            {
                "framework": framework,
                "method": method,
                "saving": saving,
                "params": model.parameters,
                "tokens": torch.tokens_per_step,
                **to_adamw._asdict(),
                "peak_bytes": grown,
                "to_torch": to_torch.ratio,
                "to_torch_p20": to_torch.ratio_p20,
                "to_torch_p80": to_torch.ratio_p80,
            }
        )
    return rows


def _rows(only: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, saving, changed settings) of each row that was asked for.

    Raises:
        UserError: for a name that no row has.
    """
    rows = [*((name, "", {}) for name in NAMES), *((METHOD, *saving) for saving in SAVINGS)]
    known = [saving or method for method, saving, _ in rows]
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := sorted(wanted - set(known)):
        raise UserError(f"--only: {', '.join(unknown)} is no row; use some of {', '.join(known)}")
    return [row for row, name in zip(rows, known, strict=True) if not wanted or name in wanted or name == "adamw"]


def run(options: Options) -> int:
    """Measure, print the table, write the file; 0."""
    rows = measure(options)
    if options.json is not None:
        write_json(options.json, rows)
    first = rows[0]
    title = (
        f"{options.preset}: {first['params']:,} parameters, {first['tokens']:,} tokens a step, {options.repeats} steps"
    )
    headings = ["method", "saving", "framework", "ms/step", "x AdamW (20–80 %)"]
    headings += ["x PyTorch (20–80 %)"] * (options.framework == "both") + ["peak MiB"] * options.peak
    table = Table(*headings, title=title)
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['ratio_p20']:.2f}–{row['ratio_p80']:.2f})"
        other = f"{row['to_torch']:.2f} ({row['to_torch_p20']:.2f}–{row['to_torch_p80']:.2f})"
        cells = [row["method"], row["saving"], row["framework"], f"{row['step_ms']:,.0f}"]
        cells.append(ratio if row["method"] != "adamw" else "1")
        if options.framework == "both":
            cells.append(other if row["framework"] != "torch" else "1")
        if options.peak:
            cells.append("?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}")
        table.add_row(*cells)
    Rich(width=110).print(table)
    return 0
