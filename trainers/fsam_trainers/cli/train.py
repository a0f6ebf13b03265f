"""`fsam train`: one model, one method."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fsam_core import backends
from fsam_trainers import checkpoints, processes, registry
from fsam_trainers.cli.options import Branching, check_backend, parse
from fsam_trainers.console import Console, command_line
from fsam_trainers.files import writable, write_json
from fsam_trainers.tables import show_values


@dataclass(frozen=True, kw_only=True)
class Train(Branching):
    """Train one model with one method. Run again with the same options, it is resumed where it was interrupted; with
    more --steps it is extended.

    Examples:
        fsam train
        fsam train --method adamw --data notes.txt --steps 1000 --out runs/notes
        fsam train --savings balanced --framework torch --preset 24m --batch 16
        fsam train --config runs/notes/config.toml --steps 2000
    """

    fresh: bool = False
    """delete the run that is in the folder, and start again"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parse(Train, arguments, "fsam train")
    if options.json is not None:
        writable("--json", options.json)
    with registry.joined(options.run.framework) as here:
        return _train(options, Console(options.quiet or not here.is_main))


def _train(options: Train, console: Console) -> int:
    from fsam_trainers.loop import train

    settings = options.settings()
    start = options.start()
    name = f"{settings.framework}-{options.preset}-{settings.method}-seed{settings.seed}"
    out = options.folder(name if start is None else f"{name}-from-{start.step}")
    so_far = checkpoints.last_known(out / "checkpoints")
    if "warmup" not in options.given and not options.fresh and so_far is not None:
        # The usual warm-up depends on --steps; a run that is extended keeps the one that it had.
        settings = options.settings(warmup=so_far["settings"]["warmup"])
    intervals = options.intervals_of(settings.steps)
    if intervals.log != "jsonl":
        backends.require(intervals.log)  # before minutes of tokenizing
    check_backend(settings, console)
    corpus = options.load_corpus(settings, console)
    figures = train(
        settings, corpus, out, intervals, console, fresh=options.fresh, branch_from=start, options=options.recorded()
    )
    figures["command"] = command_line()

    def report() -> None:
        if options.json is not None:
            write_json(options.json, figures)
        _print(figures)

    processes.current().from_main(report)  # torchrun ends the others when the first one has left
    if figures["status"] == "stopped":
        console.say(f"stopped at step {figures['steps']} of {settings.steps}; the same command resumes from there")
        return 128 + figures["signal"]
    if figures["status"] == "diverged" and processes.current().is_main:
        print(
            f"fsam: error: the run has diverged: {figures['skipped_steps']} of {figures['steps']} steps were skipped "
            f"and the validation loss is {figures['val_loss']}; lower --learning-rate {settings.learning_rate} or "
            f"--rho {settings.rho}",
            file=sys.stderr,
        )
    return 1 if figures["status"] == "diverged" else 0


def _print(figures: dict[str, Any]) -> None:
    def text(name: str, form: str) -> str:
        return "–" if figures[name] is None else format(figures[name], form)

    values = [
        ("method", figures["method"]),
        ("framework", f"{figures['framework']}/{figures['backend']} on {figures['device']}"),
        ("parameters", f"{figures['params']:,}"),
        ("steps", f"{figures['steps']:,}"),
        ("tokens", f"{figures['tokens']:,}"),
        ("seconds in steps", text("seconds", ",.1f")),
        ("ms/step, median", text("step_ms_median", ",.0f")),
        ("x AdamW's step", text("cost_ratio", ".2f")),
        ("training loss", text("train_loss", ".4f")),
        ("validation loss", text("val_loss", ".4f")),
        ("run", figures["out"]),
    ]
    if figures["skipped_steps"]:
        values.insert(-1, ("steps skipped", f"{figures['skipped_steps']:,}, because they were not finite"))
    show_values(values)
