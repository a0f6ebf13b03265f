"""`fsam export`: a run's weights for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fsam_trainers import pretrained
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.console import Console
from fsam_trainers.export import export
from fsam_trainers.tables import show_lines


@dataclass(frozen=True)
class Export:
    """Write a model into a folder that transformers, or anything that reads safetensors, can load.

    Examples:
        fsam export runs/a --to hf --out model
    """

    model: Annotated[str, tyro.conf.Positional]
    """a run's folder, RUN@STEP, a folder of safetensors, or hf:NAME"""
    to: str = "safetensors"
    """safetensors: this project's names; hf: those of transformers' GPT-2, Llama, Mistral, Qwen2 or Qwen3"""
    out: Path | None = None
    """the new folder (default: MODEL-safetensors or MODEL-hf)"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Export, arguments, "fsam export")
    found = pretrained.find(options.model, "MODEL")
    name = options.model.removeprefix("hf:")
    own = Path(Path(name).name) if options.model.startswith("hf:") else Path(name)
    own = own if own.name.strip(".") else own.resolve()  # ., ..
    out = options.out or own.with_name(f"{own.name}-{options.to}")
    export(found, options.to, out)
    show_lines(f"model: {out}")
    if found.tokenizer is None and found.config.FAMILY == "decoder":
        Console().warn(f"{options.model} has no tokenizer.json or tokenizer.model, so there is none in {out}")
    return 0
