"""The `fsam` command. Results go to stdout, progress to stderr; bad input is one sentence and exit code 2."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from fsam_core import UserError, backends
from fsam_trainers import cost_table, host_memory, processes
from fsam_trainers.console import Console
from fsam_trainers.cost_table import Cost
from fsam_trainers.files import writable, write_json
from fsam_trainers.options import Backends, Common, Compare, Profile, Train, command_line, parse


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand and exit: 0 done, 2 bad input, 128 + n stopped by signal n (state saved)."""
    try:
        if arguments is None:  # a process of its own
            arguments = sys.argv[1:]
            host_memory.keep_freed()
        if arguments[:1] == ["profile"]:
            # By name: nothing imports the profiling package, and its commands are its own.
            sys.exit(importlib.import_module("fsam_profiling.cli").main(arguments[1:] or ["--help"]))
        options = parse(arguments)
        assert not isinstance(options, Profile)
        sys.exit(run(options))
    except processes.SaidByMain:
        processes.leave(2)
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        processes.leave(2)
    except KeyboardInterrupt:
        print("fsam: interrupted", file=sys.stderr)
        processes.leave(130)
    except Exception:
        if not processes.is_leaving():
            raise
        traceback.print_exc()
        processes.leave(1)


def run(options: Train | Compare | Cost | Backends) -> int:
    """One subcommand; returns the exit code."""
    if options.json is not None:
        writable("--json", options.json)
    if isinstance(options, Backends):
        return _backends(options)
    if isinstance(options, Cost):
        return cost_table.run(options)
    with processes.together(options.framework) as here:
        console = Console(options.quiet or not here.is_main)
        if isinstance(options, Compare) and here.count > 1:
            raise UserError("fsam compare takes one process; give torchrun one `fsam train` after the other")
        return _train(options, console) if isinstance(options, Train) else _compare(options, console)


def _train(options: Train, console: Console) -> int:
    from fsam_trainers.loop import train

    settings = options.settings(options.method, options.seed)
    pace = options.pace(settings.steps)
    out = _folder(options, f"{options.framework}-{options.preset}-{options.method}-seed{options.seed}")
    backends.choose(settings.framework, settings.backend)
    corpus = _corpus(options, settings, console)
    figures = train(settings, corpus, out, pace, console)
    figures["command"] = command_line()

    def say() -> None:
        if options.json is not None:
            write_json(options.json, figures)
        _print_figures(figures)

    processes.current().from_main(say)  # torchrun ends the others when the first one has left
    if figures["status"] == "stopped":
        console.say(f"stopped at step {figures['steps']} of {settings.steps}; the same command goes on from there")
        return 128 + figures["signal"]
    return 0


def _compare(options: Compare, console: Console) -> int:
    from fsam_trainers.compare import compare

    variants = options.variants()
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    if options.cost_steps < 10:
        raise UserError(f"--cost-steps must be at least 10 for a median worth printing, got {options.cost_steps}")
    settings = next(iter(variants.values()))
    pace = options.pace(settings.steps)
    out = _folder(options, f"compare-{options.framework}-{options.preset}")
    backends.choose(settings.framework, settings.backend)
    corpus = _corpus(options, settings, console)
    comparison = compare(
        variants,
        corpus,
        out,
        pace,
        console,
        budget=options.budget,
        seeds=options.seeds,
        cost_steps=options.cost_steps,
        command=command_line(),
    )
    if comparison is None:
        console.say("stopped; the same command goes on from there")
        return 130
    if options.json is not None:
        write_json(options.json, comparison)
    _print_comparison(comparison, out)
    return 0


def _backends(options: Backends) -> int:
    rows: list[dict[str, Any]] = []
    for framework, names in backends.BACKENDS.items():
        installed = importlib.util.find_spec(framework) is not None
        picked = backends.choose(framework) if installed else None
        version = importlib.metadata.version(framework) if installed else None
        missing = "" if installed else f"pip install 'fsam[{framework}]'"
        for name in names:
            chosen = picked is not None and picked.name == name
            rows.append(
                {
                    "framework": framework,
                    "version": version,
                    "backend": name,
                    "built": backends.built(name),
                    "picked": chosen,
                    "reason": picked.reason if picked and chosen else missing,
                }
            )
    if options.json is not None:
        write_json(options.json, rows)
    table = Table("framework", "version", "backend", "in this version", "picked", "why")
    for row in rows:
        marks = ["yes" if row[name] else "" for name in ("built", "picked")]
        table.add_row(row["framework"], row["version"] or "not installed", row["backend"], *marks, row["reason"])
    _stdout().print(table)
    return 0


def _corpus(options: Common, settings: Any, console: Console) -> Any:
    from fsam_trainers.data import load

    corpus = processes.current().first_on_host(
        lambda: load(
            options.data,
            stream=options.stream,
            vocab_size=settings.model.vocab_size,
            seq_len=settings.model.seq_len,
            tokenizer=options.tokenizer,
            max_tokens=options.max_tokens,
            buffer=options.shuffle_buffer,
            workers=options.data_workers,
        )
    )
    console.say(corpus.description)
    return corpus


def _folder(options: Common, name: str) -> Path:
    out = options.out or Path("runs") / name
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give the name of a folder")
    return out


def _stdout() -> Rich:
    """A table that is piped somewhere keeps its columns whole."""
    return Rich() if sys.stdout.isatty() else Rich(width=160)


def _print_figures(figures: dict[str, Any]) -> None:
    def text(name: str, form: str) -> str:
        return "–" if figures[name] is None else format(figures[name], form)

    table = Table("method", "framework", "params", "steps", "tokens", "seconds", "ms/step", "x AdamW", "train", "val")
    table.add_row(
        figures["method"],
        f"{figures['framework']}/{figures['backend']}",
        f"{figures['params']:,}",
        f"{figures['steps']:,}",
        f"{figures['tokens']:,}",
        text("seconds", ",.1f"),
        text("step_ms_median", ",.0f"),
        text("cost_ratio", ".2f"),
        text("train_loss", ".4f"),
        text("val_loss", ".4f"),
    )
    rich = _stdout()
    rich.print(table)
    if figures["skipped_steps"]:
        rich.print(f"{figures['skipped_steps']} steps were skipped because they were not finite", markup=False)
    rich.print(f"run: {figures['out']}", markup=False, soft_wrap=True)


def _print_comparison(comparison: dict[str, Any], out: Path) -> None:
    rich = _stdout()
    table = Table(title=comparison["title"])
    for column in comparison["columns"]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in comparison["rows"]:
        table.add_row(*row["cells"])
    rich.print(table)
    for note in comparison["notes"]:
        rich.print(note, markup=False, soft_wrap=True)
    for label, name in (("plot", "plot.png"), ("report", "report.html"), ("figures", "comparison.json")):
        rich.print(f"{label}: {out / name}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
