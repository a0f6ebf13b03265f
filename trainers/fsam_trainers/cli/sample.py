"""`fsam sample`: text from a run or a model."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fsam_core import UserError
from fsam_trainers import pretrained
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.config import must


@dataclass(frozen=True)
class Sample:
    """Continue a text. stdout has the prompt and what follows it, up to the end of a document.

    Examples:
        fsam sample runs/a --prompt 'import os'
        fsam sample hf:gpt2 --temperature 0.7 --top-k 40
    """

    model: Annotated[str, tyro.conf.Positional]
    """a run's folder, RUN@STEP, a folder of safetensors, or hf:NAME"""
    prompt: str = ""
    """the text to continue (default: a document is begun)"""
    tokens: int = 200
    """tokens to add, at most"""
    temperature: float = 1.0
    """draw from p^(1/T); 0 takes the likeliest token each time"""
    top_k: int | None = None
    """draw among the k likeliest tokens"""
    seed: int = 0
    """of the draws"""
    tokenizer: Path | None = None
    """a tokenizer.json or a SentencePiece .model, for a model without its own"""
    framework: str | None = None
    """jax or torch (default: the run's own)"""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parsed(Sample, arguments, "fsam sample")
    must(options.tokens >= 1, "--tokens", options.tokens, "at least 1")
    must(0 <= options.temperature < math.inf, "--temperature", options.temperature, "a finite number >= 0")
    must(options.top_k is None or options.top_k >= 1, "--top-k", options.top_k, "at least 1")
    must(0 <= options.seed < 2**32, "--seed", options.seed, "between 0 and 2**32 - 1")
    found = pretrained.find(options.model, "MODEL")
    if found.config.FAMILY != "decoder":
        raise UserError(f"{found.where} is a model of images, which writes no text; give a run on text")
    path = options.tokenizer or found.own_tokenizer()
    from fsam_trainers import generate
    from fsam_trainers.data.pipeline import given_tokenizer

    _, tokenizer = given_tokenizer(path, found.config.vocab_size)
    assert tokenizer is not None
    # A document follows the end of the one before.
    ids = tokenizer.encode_batch([options.prompt])[0] or [tokenizer.end]
    # A cache of no more than is needed: some models take 100,000 tokens.
    sized = dataclasses.replace(found.config, seq_len=min(found.config.seq_len, len(ids) + options.tokens))
    model = pretrained.inference(found.framework_for(options.framework)).CachedDecoder(sized, found.weights())
    choose = generate.chooser(
        tokenizer.size,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        soft_cap=found.soft_cap,
    )
    added = list(generate.generate(model, ids, options.tokens, choose, tokenizer.end))
    kept = [] if ids == [tokenizer.end] else ids
    sys.stdout.write(generate.decoder(path)(kept + added) + "\n")
    return 0
