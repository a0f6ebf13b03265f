"""`fsam profile gpu`: what the compilers make of the Triton kernels, for a card that need not be here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsam_core import backends
from fsam_core.errors import UserError
from fsam_kernels.shapes import WEIGHTS
from fsam_profiling import results
from fsam_trainers.tables import show, show_lines


@dataclass(frozen=True)
class GpuOptions:
    """What the compilers make of every Triton kernel, on a machine without the card."""

    arch: str = "sm_90"
    """sm_80, sm_90, sm_100, sm_120, gfx942, or all of them: all; h200 is sm_90 with the bandwidth of that card"""
    what: Literal["head", "parameters", "step", "passes", "launches"] = "head"
    """the kernels of the head, of the parameter operations over all tensors of a model, or of a whole step; passes:
    PyTorch's own passes in the head, between kernels and products; launches: the kernels that a whole step launches;
    nothing is compiled for these two"""
    shape: str | None = None
    """one of the heads (or models) in `fsam_kernels.shapes`; default: all of them, of a step 24m;
    of launches a preset"""
    only: str = "adamw,precond-functional-sam"
    """of a step and its launches: methods and savings as in `fsam profile step --only`, or all"""
    tokens: int = 8192
    """of a step whose launches are counted"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the logits"""
    json: Path | None = None
    """also write the figures here"""


def run(options: GpuOptions) -> int:
    """Compile, print, write; 0.

    Raises:
        UserError: for a package that is missing, an architecture or shape that is not known, under TRITON_INTERPRET,
            and for a compiler whose output cannot be read.
    """
    for module in ("torch", "triton"):
        backends.require(module)
    from fsam_profiling.gpu import kernels, parameters, passes, step, step_launches
    from fsam_profiling.gpu.code import BY_NAME, CARDS

    if options.arch not in ("all", *BY_NAME):
        raise UserError(f"arch: {options.arch!r} is not known: use all, {', '.join(BY_NAME)}")
    archs = list(CARDS) if options.arch == "all" else [options.arch]
    shape = options.shape
    if options.what == "passes":
        found, table = list(passes.read(shape, options.dtype)), passes.table
    elif options.what == "launches":
        found, table = list(step_launches.read(shape or "24m", options.tokens, options.only)), step_launches.table
    elif options.what == "step":
        found, table = list(step.read(archs, shape or "24m", options.only)), step.table
    elif options.what == "head":
        found, table = list(kernels.read(archs, shape, options.dtype)), kernels.table
    else:
        if shape is not None and shape not in WEIGHTS:
            raise UserError(f"shape: {shape!r} is not known: use {', '.join(WEIGHTS)}")
        found, table = list(parameters.read(archs, WEIGHTS if shape is None else [shape])), parameters.table
    of_any = options.what in ("passes", "launches")  # of no architecture: nothing is compiled
    parts = [found] if of_any else [[row for row in found if row["arch"] == arch] for arch in archs]
    show(*map(table, parts))
    if not of_any:
        show_lines("floor: least bytes over the published bandwidth, not a timing")
    if options.json is not None:
        results.write(options.json, f"gpu {options.what}", found, {"arch": options.arch, "shape": shape})
    return 0
