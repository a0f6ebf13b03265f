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
    """a run's folder, a folder of safetensors, or hf:NAME"""
    to: str = "safetensors"
    """safetensors: this project's names; hf: transformers' GPT-2"""
    out: Path | None = None
    """the new folder (default: MODEL-safetensors or MODEL-hf)"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Export, arguments, "fsam export")
    found = pretrained.find(options.model, "MODEL")
    name = options.model.removeprefix("hf:").rstrip("/")
    out = options.out or Path(f"{Path(name).name if options.model.startswith('hf:') else name}-{options.to}")
    export(found, options.to, out)
    show_lines(f"model: {out}")
    if found.tokenizer is None and found.config.FAMILY == "decoder":
        Console().warn(f"{options.model} has no tokenizer.json or tokenizer.model, so there is none in {out}")
    return 0
