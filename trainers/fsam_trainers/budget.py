"""Equal budgets: how many steps of each variant take what AdamW's steps take, in time or in operations."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fsam_core import UserError
from fsam_core import cost as counting
from fsam_trainers import processes, timing
from fsam_trainers.config import Settings
from fsam_trainers.console import Console
from fsam_trainers.cost_table import counted, options_of
from fsam_trainers.data import AnyCorpus
from fsam_trainers.files import write_json

Budget = Literal["steps", "time", "flops"]


def within(budget: Budget, settings: Settings, measured: timing.RelativeCost) -> Settings:
    """`settings` with as many steps as fit into the budget of its own number of AdamW steps."""
    ratio = measured.ratio if budget == "time" else 1.0
    if budget == "flops":  # by the cost model, with the choice of the cotangent that a CPU makes
        model, options = counted(settings.model, settings.framework), options_of(settings, "cpu")
        ratio = counting.estimate(model, options, settings.tokens_per_step).flops_ratio
    steps = max(1, round(settings.steps / ratio))
    return dataclasses.replace(settings, steps=steps, warmup=round(settings.warmup * (steps / settings.steps)))


def measured_costs(
    variants: Mapping[str, Settings], corpus: AnyCorpus, out: Path, repeats: int, console: Console
) -> dict[str, timing.RelativeCost]:
    """The cost of every variant, measured once for a folder: a time budget must not change when a run is resumed.

    Raises:
        UserError: for a folder that holds the costs of other variants.
    """
    path = out / "costs.json"
    settings = next(iter(variants.values()))
    asked = {"variants": {name: one.as_dict() for name, one in variants.items()}}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["asked"] == json.loads(json.dumps(asked)):
                return {name: timing.RelativeCost(*values) for name, values in known["costs"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out: {path} is damaged; delete it, or give another --out") from error
        raise UserError(f"--out: {out} holds runs with other settings or methods; give another --out")
    with contextlib.closing(processes.batches(settings, corpus)) as batches:
        tokens = batches.at(0)
    with console.counting("timing the methods, interleaved", (repeats + 2) * timing.timed_steps(variants)) as tick:
        costs = timing.measure(variants, tokens, repeats, tick)
    write_json(path, {"asked": asked, "costs": costs})
    return costs
