"""`fsam cost`: what methods and savings cost beside AdamW, counted; or which of them fit a budget.

Nothing is trained. With `--machine here` the rates of the machine at hand are measured first, in seconds.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from fsam_core import cost
from fsam_core.cost.steps import Step
from fsam_core.errors import UserError
from fsam_core.methods import Perturbed
from fsam_kernels.memory import Memory, default_chunk_bytes
from fsam_trainers.config import SAVINGS as TRAINED
from fsam_trainers.config import Settings
from fsam_trainers.console import Console
from fsam_trainers.files import write_json
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.presets import preset

STEPS = 1000  # of the run: schedules are averaged, so it says nothing


@dataclass(frozen=True)
class Cost:
    """Count what a step costs beside AdamW: operations, time by a machine's rates, memory, collectives."""

    preset: str = "118m"
    """model size: tiny, or the paper's 2m, 24m, 43m, 118m, 1208m"""
    method: str = "precond-functional-sam"
    """adamw, sam, precond-sam, functional-sam, precond-functional-sam, logit-sam"""
    savings: str = "exact"
    """options by name: exact, balanced (--correction-fraction 1/4), cheap (1/8 and --cut hidden)"""
    correction_fraction: str | None = None
    """share of the batch that the second pass is computed on: 1/8, 0.25"""
    ascent: str = "full"
    """where the perturbation comes from: full, part, micro, previous, momentum, -momentum, random"""
    ascent_fraction: str | None = None
    """with --ascent part, the share of the batch whose gradient it is"""
    scope: str = "all"
    """which weights are perturbed: all, no-head, norms, or top:K"""
    cut: str | None = None
    """where the functional method holds the cotangent: logits or hidden"""
    cotangent: str = "auto"
    """how the cotangent waits for the second pass: auto, keep, recompute"""
    every: int = 1
    """a correction each k-th step"""
    between: str = "plain"
    """steps without one are plain, or reuse the last"""
    start: float = 0.0
    """share of the run before which there is none"""
    probability: float = 1.0
    """of a correction at a step that could have one"""
    all: bool = False
    """a row for every saving by itself, on top of the options given"""
    budget: float | None = None
    """list the option sets that cost at most this many times AdamW's time, cheapest first"""
    spare: bool = False
    """with --budget, also those that could do without one of their savings, or with less of it"""
    framework: str = "jax"
    """jax or torch: XLA leaves out what nothing depends on, PyTorch does what it is told"""
    machine: str = "h100"
    """a100, h100, h200, b200, mi300x, v4, v5e, v5p, v6e, tpu7x by their published peaks; here: measured"""
    batch: int | None = None
    """sequences a step, over all devices and micro-batches"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary"""
    tied: bool = True
    """one matrix for input embedding and head"""
    micro_batches: int = 1
    """parts that a device's batch is computed in"""
    devices: int = 1
    """devices the batch is spread over, each with all weights"""
    remat: bool = False
    """activation checkpointing: every backward pass runs the blocks' forward pass once more"""
    dtype: str | None = None
    """of products and activations (default: bfloat16, and float32 here)"""
    json: Path | None = None
    """also write the figures here"""


def counted(config: ModelConfig, framework: Any) -> cost.Model:
    """The trainers' decoder as the cost model sees it."""
    c = config
    sizes = (c.layers, c.width, 4 * c.width, c.heads, c.seq_len, c.vocab_size)
    return cost.decoder(*sizes, tied=c.tied, framework=framework)


# What `--all` prints: (what a row is called, changes of the options). A row that does not go with the rest is left out.
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("AdamW", {"path": "base"}),
    ("SAM", {"path": "sam"}),
    ("the method, exact", {}),
    ("cotangent recomputed", {"cotangent": "recompute"}),
    ("cotangent kept", {"cotangent": "keep"}),
    ("cut hidden", {"cut": "hidden"}),
    *((f"fraction {text}", {"fraction": float(Fraction(text))}) for text in ("1/2", "1/4", "1/8")),
    ("fraction 1/8, part's ascent", {"fraction": 1 / 8, "ascent": "part"}),
    ("fraction 1/8, cut hidden", {"fraction": 1 / 8, "cut": "hidden"}),
    ("top half of the blocks", {"scope": "half"}),
    ("top half, fraction 1/8", {"scope": "half", "fraction": 1 / 8}),
    ("all but the head", {"scope": "no-head"}),
    ("norms alone", {"scope": "norms"}),
    ("ascent of a quarter", {"ascent": "part", "ascent_fraction": 1 / 4}),
    ("ascent previous", {"ascent": "previous"}),
    ("ascent momentum", {"ascent": "momentum"}),
    ("SAM, ascent momentum", {"path": "sam", "ascent": "momentum"}),
    ("every 4th step", {"every": 4}),
    ("every 4th, reused between", {"every": 4, "between": "reuse"}),
    ("last quarter of the run", {"start": 0.75}),
    ("last tenth of the run", {"start": 0.9}),
    ("half of the steps at random", {"probability": 0.5}),
)


def run(options: Cost) -> int:
    """Count, print the tables, write the file; 0.

    Raises:
        UserError: naming the option that is wrong.
    """
    found = figures(options)
    if options.json is not None:
        write_json(options.json, found)
    rich = Rich() if sys.stdout.isatty() else Rich(width=120)
    for table in tables(found, options):
        rich.print(table)
    for note in found["notes"]:
        rich.print(note, markup=False, soft_wrap=True)
    return 0


def figures(options: Cost) -> dict[str, Any]:
    """Everything that is printed, as plain values. Bytes and seconds are of one device."""
    settings, platform = _settings(options), _platform(options)
    asked = options_of(settings, platform, devices=options.devices)
    model, tokens = counted(settings.model, settings.framework), settings.tokens_per_step * options.devices
    machine = _machine(options, model, asked, tokens)
    if options.budget is not None:
        if not options.budget >= 1 or asked.path == "base":
            got = f"{options.budget:g} with --method {options.method}"
            raise UserError(f"--budget must be at least 1, for a method with a correction; got {got}")
        sets = cost.within(options.budget, model, machine, asked, tokens=tokens, spare=options.spare)
        rows = [(_label(changes), one) for changes, one in sets]
    else:
        chosen = _every_saving(settings, model, asked) if options.all else [(options.method, asked)]
        rows = [(name, cost.of(model, o, tokens)) for name, o in chosen]
    title = f"{options.preset}, {model.parameters / 1e6:,.0f}M parameters, {tokens:,} tokens a step"
    if options.devices > 1:
        title += f" over {options.devices} devices"
    return {
        "title": f"{title}, {asked.dtype}, {options.framework} on {machine.name}",
        "model": dataclasses.asdict(model),
        "machine": dataclasses.asdict(machine),
        "tokens": tokens,
        "rows": [_row(name, one, machine) for name, one in rows],
        "notes": _notes(options, machine, rows),
    }


def options_of(settings: Settings, platform: str, *, devices: int = 1) -> cost.Options:
    """A run of the trainers on "cpu" or elsewhere, as the cost model sees it: batch and micro-batches of one device."""
    method = settings.as_method()
    changes: dict[str, Any] = {"path": "base"}
    if isinstance(method, Perturbed):
        of_method = ("path", "precondition", "fraction", "ascent", "ascent_fraction", "cut", "scope")
        changes = {name: getattr(method, name) for name in of_method}
        changes |= {name: getattr(settings, name) for name in ("every", "between", "start", "probability")}
    found = cost.Options(
        **changes,
        micro_batches=settings.micro_batches,
        remat=settings.remat,
        dtype=settings.dtype,
        devices=devices,
        framework=settings.framework,
        chunk_bytes=default_chunk_bytes(platform),
    )
    return _with_cotangent(found, settings)


def _with_cotangent(o: cost.Options, settings: Settings) -> cost.Options:
    """The cotangent as the step would decide about it."""
    rows, model = int(settings.tokens_per_step * o.fraction), settings.model
    keeps = Memory(settings.cotangent).keeps(rows, model.vocab_size, o.itemsize)
    return dataclasses.replace(o, cotangent="keep" if keeps else "recompute")


def _settings(options: Cost) -> Settings:
    """The options as those of a run, which checks them; the batch is one device's."""
    size = preset(options.preset)
    model = size.model(seq_len=options.seq_len, vocab_size=options.vocab_size, tied=options.tied, dropout=0.0)
    batch = size.batch if options.batch is None else options.batch
    if options.devices < 1 or batch % options.devices:
        raise UserError(f"--devices must be a number that divides --batch {batch}, got {options.devices}")
    if options.savings not in TRAINED:
        raise UserError(f"--savings: {options.savings!r} is not known; use one of {', '.join(TRAINED)}")
    changes: dict[str, Any] = dict(TRAINED[options.savings])
    for name in ("correction_fraction", "ascent_fraction"):
        if getattr(options, name) is not None:
            changes[name] = _number(f"--{name.replace('_', '-')}", getattr(options, name))
    if options.cut is not None:
        changes["cut"] = options.cut
    same = ("framework", "method", "micro_batches", "ascent", "scope", "every", "between", "start", "probability")
    changes |= {name: getattr(options, name) for name in (*same, "cotangent", "remat")}
    dtype: Any = options.dtype or ("float32" if options.machine == "here" else "bfloat16")
    return Settings(**changes, model=model, steps=STEPS, batch=batch // options.devices, dtype=dtype)


def _every_saving(settings: Settings, model: cost.Model, asked: cost.Options) -> list[tuple[str, cost.Options]]:
    """The rows of `SAVINGS` that go with what was asked for."""
    found = []
    for name, row in SAVINGS:
        changes = {**row, "scope": f"top:{max(1, model.layers // 2)}"} if row.get("scope") == "half" else row
        try:
            one = dataclasses.replace(asked, **changes)
        except UserError:
            continue
        found.append((name, one if "cotangent" in changes else _with_cotangent(one, settings)))
    return found


def _platform(options: Cost) -> str:
    """Of the machine; of one by name all that matters is that it is no CPU."""
    if options.machine != "here":
        return "accelerator"
    if options.framework == "torch":
        import torch

        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None else found.type
    import jax

    return jax.default_backend()


def _machine(options: Cost, model: cost.Model, o: cost.Options, tokens: float) -> cost.Machine:
    if options.machine != "here":
        if options.machine not in cost.PUBLISHED:
            known = ", ".join(("here", *cost.PUBLISHED))
            raise UserError(f"--machine: {options.machine!r} is not known; use one of {known}")
        return cost.published(options.machine)
    if o.dtype != "float32":
        raise UserError(f"--dtype: rates are measured here in float32, got {o.dtype!r}; name a --machine for others")
    from fsam_trainers import machine_probe

    Console().say("measuring this machine's rates")
    rows = tokens / o.devices / o.micro_batches
    chunk = max(1, o.chunk_bytes // (model.vocabulary * (4 if o.framework == "torch" else 8)))
    return machine_probe.measure(o.framework, model, int(rows), int(min(rows, chunk)))


def _number(option: str, text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{option} must be a number in (0, 1], 1/8 say; got {text!r}") from None


# --- as plain values --------------------------------------------------------------------------------------------------


def _row(name: str, one: cost.Cost, machine: cost.Machine) -> dict[str, Any]:
    return {
        "name": name,
        "options": dataclasses.asdict(one.options),
        "flops_ratio": one.flops_ratio,
        "time_ratio": one.time_ratio(machine),
        "peak_ratio": one.peak_bytes / one.adamw.peak_bytes,
        "peak_bytes": one.peak_bytes,
        "seconds": one.seconds(machine),
        "flops": one.flops,
        "regions": {name: {**vars(x), "seconds": machine.seconds_of(x)} for name, x in one.regions.items()},
        "taken_seconds": one.mean(lambda x: machine.seconds(x) - machine.seconds_of(x.work)),
        "collectives": one.collectives._asdict(),
        "shares": dict(one.shares),
        "steps": {kind: _step(one.steps[kind], machine, one.adamw) for kind in one.shares},
    }


def _step(step: Step, machine: cost.Machine, adamw: Step | None = None) -> dict[str, Any]:
    unit = step if adamw is None else adamw
    return {
        "flops": step.flops,
        "flops_ratio": step.flops / unit.flops,
        "seconds": machine.seconds(step),
        "time_ratio": machine.seconds(step) / machine.seconds(unit),
        "memory": dict(step.memory),
        "taken_bytes": step.taken_bytes,
        "collectives": step.collectives._asdict(),
    }


def _label(changes: dict[str, Any]) -> str:
    """{"fraction": 0.125, "cut": "hidden"} -> "fraction 1/8, cut hidden"."""
    text = lambda x: str(Fraction(x).limit_denominator(1000)) if isinstance(x, float) else x
    given = {name: text(x) for name, x in changes.items() if (name, x) != ("fraction", 1)}
    return ", ".join(f"{name} {x}" for name, x in given.items()) or "exact"


def _notes(options: Cost, machine: cost.Machine, rows: list[tuple[str, cost.Cost]]) -> list[str]:
    notes = []
    if options.budget is not None:
        notes.append(f"{len(rows)} option sets within {options.budget:g} times AdamW's time")
        if not options.spare:
            notes[0] += ", without those that could give up less and still be (--spare lists these too)"
    if machine.name.startswith("here"):
        rates = f"{machine.flops_per_s / 1e9:,.0f} and {(machine.head_flops_per_s or 0) / 1e9:,.0f} GFLOP/s"
        notes.append(f"measured here: {rates} in products of blocks and head, {machine.bytes_per_s / 1e9:,.1f} GB/s")
    else:
        notes.append("time: published peaks, products and bytes one after the other: a ratio to trust, not a duration")
    return notes


# --- as tables --------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any], options: Cost) -> list[Table]:
    """The rows beside each other, and of a single one its regions."""
    reduced = options.devices > 1
    summary = Table(title=found["title"])
    summary.add_column("options" if options.budget is not None or options.all else "method")
    headings = ["operations x", "time x", "a corrected step x", "memory x", "peak GiB"]
    for heading in (*headings, *["gradients reduced", "GB"] * reduced):
        summary.add_column(heading, justify="right")
    for row in found["rows"]:
        corrected = row["steps"].get("corrected")
        cells = [row["name"], f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}"]
        cells.append(f"{corrected['time_ratio']:.3f}" if corrected else "")
        cells += [f"{row['peak_ratio']:.2f}", f"{row['peak_bytes'] / 2**30:,.2f}"]
        if reduced:
            cells += [f"{row['collectives']['gradients']:.2f}", f"{row['collectives']['bytes'] / 1e9:,.2f}"]
        summary.add_row(*cells)
    return [summary] if len(found["rows"]) != 1 else [summary, _regions(found["rows"][0]), _memory(found["rows"][0])]


def _regions(row: dict[str, Any]) -> Table:
    """Of the average step, where its operations, bytes and time are."""
    unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "G")) if row["flops"] / u >= 1 or u == 1e9)
    table = Table(title="the average step by region")
    table.add_column("region")
    flops = [f"{part}, {name}FLOP" for part in ("blocks", "attention", "head")]
    for heading in (*flops, "GB between", "ms", "of the time"):
        table.add_column(heading, justify="right")
    total = row["seconds"]

    def add(region: str, seconds: float, *cells: float) -> None:
        texts = [f"{x:,.2f}" if x else "" for x in cells]
        table.add_row(region, *texts, f"{1000 * seconds:,.2f}", f"{seconds / total:.1%}")

    sums = dict.fromkeys(("trunk", "attention", "head", "kept", "bytes"), 0.0)
    for region, x in row["regions"].items():
        sums = {part: so_far + x[part] for part, so_far in sums.items()}
        add(region, x["seconds"], *_cells(x, unit))
    if row["taken_seconds"] > 1e-3 * total:
        add("touching new memory", row["taken_seconds"], 0, 0, 0, 0)
    table.add_section()
    add("together", total, *_cells(sums, unit))
    return table


def _cells(x: dict[str, float], unit: float) -> tuple[float, ...]:
    return x["trunk"] / unit, x["attention"] / unit, (x["head"] + x["kept"]) / unit, x["bytes"] / 1e9


def _memory(row: dict[str, Any]) -> Table:
    """Of each kind of step, what is held when most is."""
    table = Table(title="memory at its peak, GiB")
    table.add_column("held")
    names = list(dict.fromkeys(name for one in row["steps"].values() for name in one["memory"]))
    for kind in row["steps"]:
        table.add_column(f"{kind} step", justify="right")
    for name in names:
        values = [one["memory"].get(name, 0.0) for one in row["steps"].values()]
        table.add_row(name, *(f"{x / 2**30:,.3f}" if x else "" for x in values))
    table.add_section()
    table.add_row("together", *(f"{math.fsum(x['memory'].values()) / 2**30:,.3f}" for x in row["steps"].values()))
    return table
