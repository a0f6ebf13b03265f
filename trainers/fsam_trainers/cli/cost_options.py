"""The options of `fsam cost`, and the run that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fsam_core.errors import UserError, check_choice
from fsam_trainers.config import SAVINGS, SHARE, Settings
from fsam_trainers.presets import preset

STEPS = 1000  # of the run; the result does not depend on it, because schedules are averaged


@dataclass(frozen=True)
class CostOptions:
    """Count the cost of a step relative to AdamW: operations, time by a machine's rates, memory, collectives.

    Examples:
        fsam cost --preset 118m --correction-fraction 1/8 --cut hidden
        fsam cost --preset 118m --all
        fsam cost --preset 24m --budget 1.15 --devices 8
        fsam cost --preset tiny --machine here --framework torch
    """

    preset: str = "118m"
    """model size: tiny, or the paper's 2m, 24m, 43m, 118m, 1208m; of images vit-tiny, vit-s16, vit-b16"""
    method: str = "precond-functional-sam"
    """adamw, sam, precond-sam, functional-sam, precond-functional-sam, logit-sam"""
    savings: str = "exact"
    """options by name: exact, balanced (--correction-fraction 1/4), cheap (1/8 and --cut hidden), split (1/2)"""
    correction_fraction: Annotated[float | None, SHARE] = None
    """share of the batch that the second pass is computed on: 1/8, 0.25"""
    form: str | None = None
    """correction, or split: at AdamW's price, with --ascent rest"""
    ascent: str | None = None
    """where the perturbation comes from: full, part, micro, rest, previous, momentum, -momentum, random"""
    ascent_fraction: Annotated[float | None, SHARE] = None
    """with --ascent part, the share of the batch whose gradient it is"""
    scope: str | None = None
    """which weights are perturbed: all, no-head, norms, or top:K"""
    cut: str | None = None
    """where the functional method holds the cotangent: logits or hidden"""
    cotangent: str = "auto"
    """how the cotangent waits for the second pass: auto, keep, recompute"""
    every: int | None = None
    """a correction each k-th step"""
    between: str | None = None
    """steps without one are plain, or reuse the last"""
    start: float | None = None
    """share of the run before which there is none"""
    probability: float | None = None
    """of a correction at a step that could have one"""
    all: bool = False
    """a row for every saving by itself, on top of the options given"""
    budget: float | None = None
    """list the option sets with the options given that cost at most this many times AdamW's time, cheapest first"""
    spare: bool = False
    """with --budget, also sets that would fit with fewer savings, or with a weaker one"""
    framework: str = "jax"
    """jax or torch: XLA omits what no result depends on, PyTorch does not"""
    machine: str = "h100"
    """a100, h100, h200, b200, mi300x, v4, v5e, v5p, v6e, tpu7x by their published peaks; here: measured"""
    batch: int | None = None
    """sequences or images a step, over all devices and micro-batches"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary; of images the number of classes"""
    tied: bool = True
    """one matrix for input embedding and head; a model of images has none to share"""
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


def settings_of(options: CostOptions) -> Settings:
    """The options as a run's settings, which check them; the batch is one device's."""
    size = preset(options.preset)
    model = size.model(seq_len=options.seq_len, vocab_size=options.vocab_size, tied=options.tied, dropout=0.0)
    batch = size.batch if options.batch is None else options.batch
    if options.devices < 1 or batch % options.devices:
        raise UserError(f"--devices must be a number that divides --batch {batch}, got {options.devices}")
    same = ("framework", "method", "micro_batches", "cotangent", "remat")
    changes = given(options) | {name: getattr(options, name) for name in same}
    dtype: Any = options.dtype or ("float32" if options.machine == "here" else "bfloat16")
    return Settings(**changes, model=model, steps=STEPS, batch=batch // options.devices, dtype=dtype)


def given(options: CostOptions) -> dict[str, Any]:
    """The savings that the options name, as fields of `Settings`."""
    check_choice("--savings", options.savings, SAVINGS)
    of_method = ("correction_fraction", "ascent_fraction", "cut", "form", "ascent", "scope")
    names = (*of_method, "every", "between", "start", "probability")
    return {**SAVINGS[options.savings]} | {name: x for name in names if (x := getattr(options, name)) is not None}
