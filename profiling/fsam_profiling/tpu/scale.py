"""A sharded step compiled for all chips of a TPU topology, without the chips: `fsam profile tpu --what scale`.

The memory of each chip is the compiler's own account of HBM; the traffic between chips is read in the compiled program.
The batch, the weights and the moments are sharded over all chips (the trainer's `--fsdp`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from fsam_core.errors import UserError
from fsam_profiling import results
from fsam_profiling.rows import METHOD, SAVINGS
from fsam_profiling.tpu.collectives import bytes_of
from fsam_profiling.tpu.compiler import ask
from fsam_trainers import presets
from fsam_trainers.tables import show, show_lines

# name -> (topology that libtpu knows, its chips, HBM of a chip in GiB as published)
CHIPS = {
    "v4": ("v4:2x2x1", 4, 32),
    "v5e": ("v5e:2x2", 4, 16),
    "v5p": ("v5p:2x2x1", 4, 95),
    "v6e": ("v6e:2x2", 4, 32),
}
# name -> (method, changes of its settings)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "exact": (METHOD, {}),
    **{name: (METHOD, dict(SAVINGS)[name]) for name in ("1/4", "1/8", "cut hidden", "1/8 + cut hidden")},
    "adamw + remat": ("adamw", {"remat": True}),
    "exact + remat": (METHOD, {"remat": True}),
}


def run(
    chip: str,
    only: str | None,
    backend: str,
    path: Path | None,
    *,
    preset: str,
    batch: int | None,
    seq_len: int | None,
    vocab_size: int | None,
    dtype: str,
    micro_batches: int,
) -> int:
    """Compile each row's step, print, write; 0.

    Raises:
        UserError: for an unknown chip or preset, and where the compiler refuses a step, as one that does not fit.
    """
    if chip not in CHIPS:
        raise UserError(f"--chip: {chip!r} is no chip of --what scale; use {', '.join(CHIPS)}")
    _, chips, _ = CHIPS[chip]
    same = {
        "name": preset,
        "batch": batch or presets.preset(preset).batch,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "micro_batches": micro_batches,
        "backend": backend,
        "fsdp": chips,
    }
    about = {"chip": chip, "topology": CHIPS[chip][0], **same}
    rows: list[dict[str, Any]] = []
    for name, (method, changes) in chosen(only).items():
        found = compiled(chip, same | {"method": method, "changes": changes})
        peak = peak_bytes(found)
        base = rows[0]["peak_bytes"] if rows else peak
        rows.append({"row": name, "method": method, "options": changes, "peak_bytes": peak, "x_adamw": peak / base})
        rows[-1] |= found
        print(f"compiled {name}: {peak / 2**30:.2f} GiB a chip", file=sys.stderr)
        if path is not None:  # after every row, which takes minutes: an interruption loses none
            results.write(path, "tpu scale", rows, about)
    show(table(rows, about))
    show_lines("The compiler's own account; nothing was run.")
    return 0


def chosen(only: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows that `--only` names, AdamW's first; all rows by default.

    Raises:
        UserError: for an unknown row.
    """
    if only is None:
        return ROWS
    wanted = {"adamw", *filter(None, (name.strip() for name in only.split(",")))}
    if unknown := sorted(wanted - set(ROWS)):
        raise UserError(f"--only: {', '.join(unknown)} is no row of --what scale; use some of {', '.join(ROWS)}")
    return {name: row for name, row in ROWS.items() if name in wanted}


def compiled(chip: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The answer of `scale_child` for these settings.

    Raises:
        UserError: where the compiler refuses; its last lines are quoted.
    """
    what = f"the step of {settings['method']} {settings['changes'] or ''}".strip()
    return ask(chip, "fsam_profiling.tpu.scale_child", {"topology": CHIPS[chip][0], "settings": settings}, what)


def peak_bytes(found: dict[str, Any]) -> int:
    """HBM of a chip for arguments, results that are in no argument's place, and temporaries."""
    return found["argument_bytes"] + found["output_bytes"] - found["aliased_bytes"] + found["temporary_bytes"]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> Table:
    """One line a step; all figures are of one chip."""
    _, chips, hbm = CHIPS[about["chip"]]
    title = f"{about['name']}, {about['batch']} sequences in {about['micro_batches']} micro-batches, {about['dtype']}"
    result = Table(title=f"{title}: {chips} chips {about['chip']} of {hbm} GiB")
    result.add_column("step", no_wrap=True)
    for name in ("state GiB", "temporaries GiB", "peak GiB", "x AdamW", "of HBM", "gathered GB", "reduced GB"):
        result.add_column(name, justify="right")
    for row in rows:
        sent = row["collectives"]
        result.add_row(
            row["row"],
            f"{row['argument_bytes'] / 2**30:.2f}",
            f"{row['temporary_bytes'] / 2**30:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['x_adamw']:.2f}",
            f"{row['peak_bytes'] / 2**30 / hbm:.0%}",
            f"{bytes_of(sent, 'all-gather') / 1e9:.1f}",
            f"{bytes_of(sent, 'all-reduce', 'reduce-scatter') / 1e9:.1f}",
        )
    return result
