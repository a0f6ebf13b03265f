"""The cost of methods and savings relative to AdamW, counted for the trainers' models, and what fits a budget."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from fsam_core import cost
from fsam_core.cost.steps import StepCost
from fsam_core.errors import UserError, check_choice
from fsam_core.methods import Perturbed
from fsam_kernels.memory import Memory, default_chunk_bytes
from fsam_trainers import device, metrics
from fsam_trainers.config import Settings
from fsam_trainers.console import Console
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.models.vit_layout import ViTConfig


def counted(config: ModelConfig, framework: Any) -> cost.Model:
    """The trainers' model as the cost model sees it; of a Vision Transformer a row of the head is an image."""
    c = config
    sizes = (c.layers, c.width, c.F, c.heads, c.seq_len, c.vocab_size)
    shape: Any = {"kv_heads": c.K, "head_width": c.d, "gated": c.swiglu, "rotary": c.rotary}
    found = cost.decoder(*sizes, tied=c.tied, framework=framework, **shape)
    if not isinstance(c, ViTConfig):
        return found
    L = c.seq_len
    counts = ("trunk_flops", "attention_flops", "saved_values", "exponentials")
    of_image = {name: L * getattr(found, name) for name in counts}
    of_image["trunk_flops"] += 2 * c.patches * math.prod(c.input_shapes["patches"])
    return dataclasses.replace(found, **of_image, parameters=c.parameters, tokens=L)


# The rows of `--all`: (name, changes of the options). A row that the given options exclude is left out.
SPLIT: dict[str, Any] = {"form": "split", "ascent": "rest"}
TABLE_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("AdamW", {"path": "base"}),
    ("SAM", {"path": "sam"}),
    ("the method, exact", {}),
    ("cotangent recomputed", {"cotangent": "recompute"}),
    ("cotangent kept", {"cotangent": "keep"}),
    ("cut hidden", {"cut": "hidden"}),
    *((f"fraction {text}", {"fraction": float(Fraction(text))}) for text in ("1/2", "1/4", "1/8")),
    *((f"split {text}", SPLIT | {"fraction": float(Fraction(text))}) for text in ("1/2", "1/4")),
    *((f"SAM, split {q}", SPLIT | {"path": "sam", "fraction": float(Fraction(q))}) for q in ("1/2", "1/4")),
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

# The study's regime in which runs overfit, in a checkout alone.
STUDY = Path(__file__).parents[2] / "docs" / "results" / "study" / "scarce.jsonl"
# The options that change what is trained: with others than its row's, a row has no loss.
TRAINED = ("path", "precondition", "fraction", "form", "ascent", "ascent_fraction", "cut", "scope", "every", "between",
           "start", "probability")  # fmt: skip
# Row -> the study's row that was trained with the same savings of STUDIED_METHOD.
STUDIED_METHOD = "precond-functional-sam"
STUDIED = {
    "SAM": "precond-SAM",
    "the method, exact": "functional",
    "cut hidden": "hidden cut",
    **{f"fraction {q}": f"functional, {q}" for q in ("1/2", "1/4", "1/8")},
    **{f"split {q}": f"functional, split {q}" for q in ("1/2", "1/4")},
    **{f"SAM, split {q}": f"precond-SAM, split {q}" for q in ("1/2", "1/4")},
    "fraction 1/8, part's ascent": "1/8, part's ascent",
    "fraction 1/8, cut hidden": "1/8, hidden cut",
    "top half of the blocks": "upper half of the blocks",
    "ascent previous": "previous ascent",
    "ascent momentum": "momentum",
    "every 4th step": "every 4th step",
    "every 4th, reused between": "every 4th, reused between",
    "last quarter of the run": "last quarter",
}


def figures(
    settings: Settings,
    preset: str,
    machine: str,
    *,
    devices: int = 1,
    every_saving: bool = False,
    budget: float | None = None,
    spare: bool = False,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """All printed figures, as plain values. Bytes and seconds are those of one device.

    Args:
        settings: a run on one of the devices.
        preset: for the title.
        machine: a name in `cost.PUBLISHED`, or "here" to measure.
        every_saving: a row for each of `TABLE_ROWS`.
        budget: rows of all option sets within so many times AdamW's time; with `spare` also dominated ones.
        kept: fields of `cost.Options` that the budget's sets do not change, because the user gave them.

    Raises:
        UserError: naming the option that is wrong.
    """
    platform = device.platform(settings.framework) if machine == "here" else "accelerator"
    asked = options_of(settings, platform, devices=devices)
    model, tokens = counted(settings.model, settings.framework), settings.tokens_per_step * devices
    rates = _machine(machine, model, asked, tokens)
    if budget is not None:
        if not budget >= 1 or asked.path == "base":
            got = f"{budget:g} with --method {settings.method}"
            raise UserError(f"--budget must be at least 1, for a method with a correction; got {got}")
        settled = partial(_with_cotangent, settings=settings)
        sets = cost.within(budget, model, rates, asked, tokens=tokens, spare=spare, kept=kept, settled=settled)
        given = {name: getattr(asked, name) for name in TRAINED if name in kept}
        rows = [(_label(given | changes), one) for changes, one in sets]
    else:
        chosen = _every_saving(settings, model, asked) if every_saving else [(settings.method, asked)]
        rows = [(name, cost.estimate(model, o, tokens)) for name, o in chosen]
    unit = "tokens" if model.tokens == 1 else "images"
    title = f"{preset}, {model.parameters / 1e6:,.0f}M parameters, {tokens:,} {unit} a step"
    if devices > 1:
        title += f" over {devices} devices"
    notes = [_rates_note(rates)]
    if budget is not None:
        without = "" if spare else ", without those that could give up less and still be (--spare lists these too)"
        notes.insert(0, f"{len(rows)} option set{'s' * (len(rows) != 1)} within {budget:g} times AdamW's time{without}")
    quality = _quality() if settings.method == STUDIED_METHOD and model.tokens == 1 else {}  # of text
    study = lambda name, o: quality.get(name) if _trained(name, o, model) else None
    found = [_row(name, one, rates) | {"study": study(name, one.options)} for name, one in rows]
    if any(row["study"] is not None for row in found):
        notes.append("loss: minus AdamW's where small models overfit, to about 0.1 (docs/results/study.md)")
    too_large = sum(not row["fits"] for row in found)
    if too_large and rates.memory_bytes:
        which = "does" if len(found) == 1 else f"{too_large} of {len(found)} rows, marked *, do"
        notes.insert(
            0,
            f"{which} not fit into the {rates.memory_bytes / 1e9:,.0f} GB of a {rates.name}: give more "
            "--devices or --micro-batches, a smaller --batch, or --remat",
        )
    return {
        "title": f"{title}, {asked.dtype}, {settings.framework} on {rates.name}",
        "model": dataclasses.asdict(model),
        "machine": dataclasses.asdict(rates),
        "tokens": tokens,
        "rows": found,
        "notes": notes,
    }


def options_of(settings: Settings, platform: str, *, devices: int = 1) -> cost.Options:
    """A run of the trainers on "cpu" or elsewhere, as the cost model sees it: batch and micro-batches of one device."""
    method = settings.as_method()
    changes: dict[str, Any] = {"path": "base"}
    if isinstance(method, Perturbed):
        of_method = ("path", "precondition", "fraction", "form", "ascent", "ascent_fraction", "cut", "scope")
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
    """The options with the cotangent kept or recomputed, as the step would decide.

    Raises:
        UserError: for a share that the batch is not cut at.
    """
    if not (settings.is_cut_at(o.fraction) and settings.is_cut_at(o.ascent_fraction or 1)):
        raise UserError(f"fraction: {o.fraction:g} of {settings.batch} sequences")
    rows, model = int(settings.tokens_per_step * o.fraction), settings.model
    keeps = Memory(settings.cotangent).keeps(rows, model.vocab_size, o.itemsize)
    return dataclasses.replace(o, cotangent="keep" if keeps else "recompute")


def _every_saving(settings: Settings, model: cost.Model, asked: cost.Options) -> list[tuple[str, cost.Options]]:
    """The rows of `TABLE_ROWS` that the given options allow."""
    found = []
    for name, row in TABLE_ROWS:
        changes = _at(row, model)
        try:
            given = dataclasses.replace(asked, **changes)
            one = _with_cotangent(given, settings)
        except UserError:
            continue
        found.append((name, given if "cotangent" in changes else one))
    return found


def _at(row: dict[str, Any], model: cost.Model) -> dict[str, Any]:
    """A row of `TABLE_ROWS` for this model: half of its blocks in numbers."""
    return {**row, "scope": f"top:{max(1, model.layers // 2)}"} if row.get("scope") == "half" else row


def _machine(name: str, model: cost.Model, o: cost.Options, tokens: float) -> cost.Machine:
    if name != "here":
        check_choice("--machine", name, ("here", *cost.PUBLISHED))
        return cost.published(name)
    if o.dtype != "float32":
        raise UserError(f"--dtype: rates are measured here in float32, got {o.dtype!r}; name a --machine for others")
    from fsam_trainers import machine_probe

    Console().say("measuring this machine's rates")
    rows = tokens / o.devices / o.micro_batches
    chunk = max(1, o.chunk_bytes // (model.vocabulary * (4 if o.framework == "torch" else 8)))
    return machine_probe.measure(o.framework, model, int(rows * model.tokens), int(min(rows, chunk)))


# --- as plain values --------------------------------------------------------------------------------------------------


def _quality() -> dict[str, float]:
    """Row -> its mean difference in validation loss from AdamW's runs of the same data and seeds, in the study."""
    losses: dict[str, dict[Any, float]] = {}
    for line in metrics.read(STUDY):
        if line["val_loss"] is not None:
            losses.setdefault(line["row"], {})[line["data"], line["seed"]] = line["val_loss"]
    adamw, found = losses.get("AdamW", {}), {}
    for name, label in STUDIED.items():
        if pairs := adamw.keys() & losses.get(label, {}).keys():
            found[name] = statistics.fmean(losses[label][pair] - adamw[pair] for pair in pairs)
    return found


def _trained(name: str, o: cost.Options, model: cost.Model) -> bool:
    """Whether these options are those that the study trained its row of that name with."""
    row = _at(dict(TABLE_ROWS).get(name, {}), model)
    return all(getattr(o, field) == row.get(field, getattr(cost.Options(), field)) for field in TRAINED)


def _row(name: str, one: cost.Cost, machine: cost.Machine) -> dict[str, Any]:
    return {
        "name": name,
        "options": dataclasses.asdict(one.options),
        "flops_ratio": one.flops_ratio,
        "time_ratio": one.time_ratio(machine),
        "peak_ratio": one.peak_bytes / one.adamw.peak_bytes,
        "peak_bytes": one.peak_bytes,
        "fits": machine.memory_bytes is None or one.peak_bytes <= machine.memory_bytes,
        "seconds": one.seconds(machine),
        "flops": one.flops,
        "regions": {name: {**vars(x), "seconds": machine.seconds_of(x)} for name, x in one.regions.items()},
        "taken_seconds": one.mean(lambda x: machine.seconds(x) - machine.seconds_of(x.work)),
        "collectives": one.collectives._asdict(),
        "shares": dict(one.shares),
        "steps": {kind: _step(one.steps[kind], machine, one.adamw) for kind in one.shares},
    }


def _step(step: StepCost, machine: cost.Machine, adamw: StepCost | None = None) -> dict[str, Any]:
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
    others = {name: text(x) for name, x in changes.items() if x != getattr(cost.Options(), name)}
    return ", ".join(f"{name.replace('_', ' ')} {x}" for name, x in others.items()) or "exact"


def _rates_note(machine: cost.Machine) -> str:
    if not machine.name.startswith("here"):
        return "time: published peaks, products and bytes one after the other: a ratio to trust, not a duration"
    rates = f"{machine.flops_per_s / 1e9:,.0f} and {(machine.head_flops_per_s or 0) / 1e9:,.0f} GFLOP/s"
    return f"measured here: {rates} in products of blocks and head, {machine.bytes_per_s / 1e9:,.1f} GB/s"
