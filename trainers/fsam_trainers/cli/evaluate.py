"""`fsam evaluate`: losses of runs and models on held-out texts, with standard errors and paired differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.markup import escape
from rich.table import Table

from fsam_core import UserError, backends
from fsam_trainers import pretrained
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.console import Console, command_line
from fsam_trainers.files import writable, write_json
from fsam_trainers.pretrained import Pretrained
from fsam_trainers.tables import show, show_lines

T = TypeVar("T", int, float)
Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluate:
    """Loss and perplexity of models on held-out texts, each with its standard error over the windows.

    Examples:
        fsam evaluate runs/a runs/b
        fsam evaluate runs/a hf:gpt2 --data python,notes.txt --quantize 8,4
        fsam evaluate runs/a --fine-tune notes.txt --rates 1e-5,1e-4
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """runs' folders, RUN@STEP, folders of safetensors, or hf:NAME; the others are compared with the first"""
    task: Literal["text", "images"] | None = None
    """text or images (default: what the first model was trained on)"""
    data: str | None = None
    """texts or sets of images, with commas between; their held-out parts are read (default: the first run's)"""
    quantize: str = ""
    """also after rounding to nearest with so many bits, by channel: 8,4,3"""
    noise: str = ""
    """also with Gaussian noise of so many times each matrix's root mean square: 0.01,0.1"""
    draws: int = 3
    """draws of the noise, over which losses are averaged"""
    fine_tune: str = ""
    """train each model on this text at each of --rates, and compare it with itself before, on it and on --data"""
    rates: str = "1e-5,3e-5,1e-4"
    """with --fine-tune, peak learning rates of AdamW"""
    steps: int = 100
    """with --fine-tune, steps at each rate"""
    batch: int = 16
    """with --fine-tune, sequences a step"""
    out: Path = Path("runs/fine-tune")
    """with --fine-tune, the folder of its runs and of forgetting.png; a run that is there is resumed"""
    sequences: int | None = None
    """windows of each text, at most (default: 256), or images (default: all)"""
    seq_len: int | None = None
    """tokens a window (default: the smallest of the models')"""
    tokenizer: Path | None = None
    """a tokenizer.json or a SentencePiece .model, for models without their own"""
    framework: str | None = None
    """jax or torch (default: the run's own)"""
    json: Path | None = None
    """also write the figures here"""
    quiet: bool = False
    """no progress on stderr"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Evaluate, arguments, "fsam evaluate")
    if not options.models:
        raise UserError("MODELS: give at least one: a run's folder, RUN@STEP, a folder of safetensors, or hf:NAME")
    bits = _numbers("--quantize", options.quantize, int, lambda n: 2 <= n <= 16, "numbers of bits from 2 to 16: 8,4,3")
    positive = lambda x: 0 < x < math.inf
    sigmas = _numbers("--noise", options.noise, float, positive, "finite numbers > 0: 0.01,0.1")
    rates = _numbers("--rates", options.rates, float, positive, "finite numbers > 0: 1e-5,1e-4")
    if options.data is not None and not options.data.strip(","):
        raise UserError(f"--data must name at least one text, got {options.data!r}")
    for name, value in (("--draws", options.draws), ("--sequences", options.sequences), ("--seq-len", options.seq_len)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if options.json is not None:
        writable("--json", options.json)
    if options.fine_tune:
        backends.require("matplotlib")  # before minutes of training
    from fsam_trainers.evaluation import changes

    models = [pretrained.find(source, "MODELS") for source in options.models]
    task = options.task or ("text" if models[0].config.FAMILY == "decoder" else "images")
    if options.fine_tune and task == "images":
        raise UserError("--fine-tune takes models of text; `fsam train --task images --init-from RUN` trains on images")
    given = [options.data or models[0].data]
    if options.data is not None and not Path(options.data).expanduser().exists():  # a name may have a comma
        given = options.data.split(",")
    specs = [spec for spec in dict.fromkeys([*given, options.fine_tune]) if spec]
    changed = changes(bits, sigmas, options.draws)
    if options.fine_tune:
        rows = _fine_tuned(options, models, specs, changed, rates)
    else:
        rows = _evaluated(options, models, specs, changed, task)
    if options.json is not None:
        write_json(options.json, {"command": command_line(), "rows": rows})
    _print(rows)
    if options.fine_tune:
        show_lines(f"plot: {options.out / 'forgetting.png'}")
    return 0


def _evaluated(
    options: Evaluate, models: list[Pretrained], specs: list[str], changed: list[Any], task: str = "text"
) -> list[Row]:
    """The rows of models that are compared with the first of them."""
    from fsam_trainers import evaluation, image_evaluation

    how: Any = {"framework": lambda found: found.framework_for(options.framework)}
    if task == "images":
        found = image_evaluation.evaluate(models, specs, changed, most=options.sequences, **how)
    else:
        how |= {"tokenizer": options.tokenizer, "seq_len": options.seq_len, "most": options.sequences or 256}
        found = evaluation.evaluate(models, specs, changed, **how)
    rows = []
    with Console(options.quiet).counting("evaluating", len(models) * len(changed) * len(specs)) as advance:
        for row in found:
            rows.append(row)
            advance()
    return rows


def _fine_tuned(
    options: Evaluate, models: list[Pretrained], specs: list[str], changed: list[Any], rates: list[float]
) -> list[Row]:
    """The rows of each model and of its fine-tuned runs, which are compared with it."""
    from fsam_trainers.fine_tuning import fine_tuned, write_plot

    rows = []
    for number, base in enumerate(models):
        runs = fine_tuned(
            base,
            options.fine_tune,
            rates,
            options.out / f"model-{number}",
            Console(options.quiet),
            framework=base.framework_for(options.framework),
            steps=options.steps,
            batch=options.batch,
            tokenizer=options.tokenizer,
        )
        group = [base]
        for run in runs:
            tuned = pretrained.find(run, "--out")
            # One on files of tokens has no tokenizer of its own; its ids are the base's.
            group.append(dataclasses.replace(tuned, tokenizer=tuned.tokenizer or base.tokenizer))
        found = _evaluated(options, group, specs, changed)
        rows += [{**row, "base": base.source, "rate": runs.get(row["model"])} for row in found]
    write_plot(options.out / "forgetting.png", rows, options.fine_tune)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    each, other = ("image", "accuracy") if "val_accuracy" in rows[0] else ("window", "perplexity")
    title = f"loss in nats {'an image' if each == 'image' else 'a token'}, ± standard error over {each}s"
    table = Table("model", "weights", "data", f"{each}s", "loss", other, "minus the first", title=title)
    for row in rows:
        middle = _with_error(row, "val_accuracy", 4) if other == "accuracy" else _with_error(row, "perplexity", 2)
        cells = (_with_error(row, "loss", 4), middle, _with_error(row, "difference", 4))
        table.add_row(escape(row["model"]), row["weights"], escape(row["data"]), f"{row['windows']:,}", *cells)
    show(table)


def _with_error(row: dict[str, Any], name: str, digits: int) -> str:
    value, error = row[name], row[f"{name}_error"]
    return "–" if value is None else f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _numbers(option: str, text: str, kind: Callable[[str], T], is_good: Callable[[T], bool], works: str) -> list[T]:
    """The numbers between the commas of an option.

    Raises:
        UserError: for one that is none, or not good.
    """
    try:
        found = [kind(one) for one in text.split(",") if text]
    except ValueError:
        found = []
    if (text and not found) or not all(map(is_good, found)):
        raise UserError(f"{option} must be {works}, got {text!r}")
    return found
