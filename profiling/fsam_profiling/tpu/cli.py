"""`fsam profile tpu`: heads, steps and parameter operations by the TPU compiler, without the chip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsam_profiling.tpu import head, parameters, scale, step


@dataclass(frozen=True)
class TpuOptions:
    """What the TPU compiler makes of heads and steps, without the chip: cycles, memory, kernels."""

    chip: str = "v5e"
    """v4, v5e, v5p, v6e or tpu7x"""
    what: Literal["head", "step", "parameters", "scale"] = "head"
    """the head alone, whole training steps, the parameter operations of a model, or steps sharded over four chips"""
    head: str = "reference"
    """shape: tiny, 2m, 24m, 43m, 118m, 1208m, reference, gpt2, llama3-8b"""
    backend: Literal["all", "xla", "pallas"] = "all"
    """whose loss and gradients: all (of scale: xla), xla or pallas"""
    rows: int = 2048
    """rows of a chunk of the head"""
    preset: str = "24m"
    """of a step: the model"""
    batch: int | None = None
    """of a step: sequences, all on one core, default 16; of a sharded step over all chips, default the preset's"""
    micro_batches: int = 8
    """of a sharded step: parts in which a batch is computed"""
    seq_len: int | None = None
    """of a step: tokens a sequence"""
    vocab_size: int | None = None
    """of a step: size of the vocabulary"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of a step: compute dtype of the model; weights, gradients and moments are float32"""
    only: str = "adamw,precond-functional-sam"
    """of a step: methods and savings as in `fsam profile step --only`, textbook, or all"""
    model: str = "24m"
    """of the parameter operations: model whose tensors they work on, 24m, 118m, 1208m or gpt2"""
    json: Path | None = None
    """also write the figures here"""


def run(options: TpuOptions) -> int:
    """Compile, print, write; 0.

    Raises:
        UserError: for an unknown chip, head, model, preset or row, and as `compiler.compile_for`.
    """
    backends = ("xla", "pallas") if options.backend == "all" else (options.backend,)
    if options.what == "head":
        return head.run(options.chip, options.head, backends, options.rows, options.json)
    if options.what == "parameters":
        return parameters.run(options.chip, options.model, options.json)
    model = {name: getattr(options, name) for name in ("preset", "batch", "seq_len", "vocab_size", "dtype")}
    if options.what == "step":
        return step.run(options.chip, options.only, backends, options.json, **model)
    only = None if options.only == TpuOptions.only else options.only
    return scale.run(options.chip, only, backends[0], options.json, micro_batches=options.micro_batches, **model)
