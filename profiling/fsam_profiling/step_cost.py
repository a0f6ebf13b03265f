"""Step time of every method in both frameworks, taken turn about in one process: `make bench`.

Each row's ratio is to AdamW in the same framework, and the last column sets the two frameworks against each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console as Rich
from rich.table import Table

from fsam_core import NAMES
from fsam_trainers import cost
from fsam_trainers.console import Console
from fsam_trainers.files import write_json
from fsam_trainers.presets import preset
from fsam_trainers.settings import Framework, Settings

# The correction on part of the batch, for the method that is meant to be used.
PART, FRACTIONS = "precond-functional-sam", ("1/4", "1/8")


@dataclass(frozen=True)
class Options:
    """Time one optimizer step of each method on random tokens."""

    preset: str = "tiny"
    """model size, as in `fsam train`"""
    batch: int | None = None
    """sequences a step"""
    seq_len: int | None = None
    """tokens a sequence"""
    repeats: int = 15
    """steps of each variant"""
    json: Path | None = None
    """also write the figures here"""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row a framework and variant: step_ms, ratio to AdamW with its spread, ratio to PyTorch's same variant."""
    size = preset(options.preset)
    model = size.model(seq_len=options.seq_len, tied=True, dropout=0.0)
    torch = Settings(framework="torch", method="adamw", model=model, steps=1000, batch=options.batch or size.batch)
    torch = dataclasses.replace(torch, learning_rate=size.learning_rate, rho=size.rho)
    frameworks: tuple[Framework, ...] = ("jax", "torch")
    variants = {
        (framework, method, q): dataclasses.replace(
            torch, framework=framework, method=method, correction_fraction=float(Fraction(q))
        )
        for method, q in [*((name, "1") for name in NAMES), *((PART, q) for q in FRACTIONS)]
        for framework in frameworks
    }
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (torch.batch, model.seq_len + 1), dtype=np.int32)
    with Console().counting("timing", (options.repeats + 2) * len(variants)) as tick:
        times = cost.interleaved(variants, tokens, options.repeats, tick)
    rows = []
    for (framework, method, q), milliseconds in times.items():
        to_adamw = cost.against(milliseconds, times[framework, "adamw", "1"])
        to_torch = cost.against(milliseconds, times["torch", method, q])
        rows.append(
            {
                "framework": framework,
                "method": method,
                "correction_fraction": q,
                "params": model.parameters,
                "tokens": torch.tokens_per_step,
                **to_adamw._asdict(),
                "to_torch": to_torch.ratio,
                "to_torch_p20": to_torch.ratio_p20,
                "to_torch_p80": to_torch.ratio_p80,
            }
        )
    return rows


def main() -> None:
    options = tyro.cli(Options, prog="python -m fsam_profiling.step_cost")
    rows = measure(options)
    if options.json is not None:
        write_json(options.json, rows)
    first = rows[0]
    title = (
        f"{options.preset}: {first['params']:,} parameters, {first['tokens']:,} tokens a step, {options.repeats} steps"
    )
    table = Table("method", "part", "framework", "ms/step", "x AdamW (20–80 %)", "x PyTorch (20–80 %)", title=title)
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['ratio_p20']:.2f}–{row['ratio_p80']:.2f})"
        other = f"{row['to_torch']:.2f} ({row['to_torch_p20']:.2f}–{row['to_torch_p80']:.2f})"
        cells = (ratio if row["method"] != "adamw" else "1", other if row["framework"] != "torch" else "1")
        table.add_row(row["method"], row["correction_fraction"], row["framework"], f"{row['step_ms']:,.0f}", *cells)
    Rich(width=110).print(table)


if __name__ == "__main__":
    main()
