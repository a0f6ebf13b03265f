"""The command line as data: what each subcommand takes, and how it becomes `Settings`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fsam_core import NAMES, UserError
from fsam_trainers.config import HOW, SAVINGS, Pace, Settings, steps_for
from fsam_trainers.cost_table import Cost
from fsam_trainers.presets import preset

DEFAULT_STEPS = 300


@dataclass(frozen=True)
class Common:
    """Options of `train` and `compare`; every None is replaced by the preset's own value."""

    framework: str = "jax"
    """jax or torch"""
    preset: str = "tiny"
    """model size: tiny, or the paper's 2m, 24m, 43m, 118m, 1208m (non-embedding parameters)"""
    data: str = "python"
    """python (its own sources), text, .jsonl[.gz|.zst], .parquet, a folder or glob of these, .bin, hf:NAME[:CONFIG]"""
    stream: Literal["auto", "yes", "no"] = "auto"
    """make tokens while training, without reading all first (auto: hf: and over 1 GB, if there is no --max-tokens)"""
    shuffle_buffer: int = 2048
    """with a stream, sequences that are shuffled together"""
    data_workers: int | None = None
    """with a stream, tokenizing processes a rank (default: one fewer than cores, 1 to 4); 0: none but the run's own"""
    tokenizer: Path | None = None
    """a tokenizer.json; without one a byte-level BPE is trained on the data"""
    max_tokens: int | None = None
    """read at most this many training tokens"""
    steps: int | None = None
    """optimizer steps (default 300)"""
    tokens_per_param: float | None = None
    """instead of --steps: tokens for each non-embedding parameter (Chinchilla: about 20)"""
    rho: float | None = None
    """length of the perturbation, in the units of the weights"""
    rho_schedule: str = Settings.rho_schedule
    """constant, cosine (down to 0 at the end), or learning-rate (in proportion to it)"""
    norm: str = Settings.norm
    """l2: rho d / |d|; dual: rho d / sqrt(g.d); per-tensor: l2 of each tensor by itself"""
    second_moment: str = Settings.second_moment
    """current: this step's gradient is folded in; previous: the optimizer's as it stands"""
    savings: str = "exact"
    """options by name: exact, balanced (--correction-fraction 1/4), cheap (1/8 and --cut hidden)"""
    correction_fraction: str | None = None
    """share of the batch that the second pass is computed on: 1/8, 0.25"""
    ascent: str = Settings.ascent
    """where the perturbation comes from: full, part, micro (each its own), previous, momentum, -momentum, random"""
    ascent_fraction: str | None = None
    """with --ascent part, the share of the batch whose gradient it is (default: the correction's)"""
    scope: str = Settings.scope
    """which weights are perturbed: all, no-head, norms, or top:K, the K last blocks and what stands above"""
    cut: str | None = None
    """where the functional method holds the cotangent: logits, or hidden (a second pass without the vocabulary)"""
    every: int = Settings.every
    """a correction each k-th step"""
    start: float = Settings.start
    """share of the run before which there is none"""
    probability: float = Settings.probability
    """of a correction at a step that could have one"""
    between: str = Settings.between
    """steps without one are plain, or reuse the last"""
    cotangent: str = Settings.cotangent
    """how the logit cotangent waits for the second pass: auto, keep (more memory), recompute"""
    batch: int | None = None
    """sequences a step"""
    micro_batches: int = Settings.micro_batches
    """parts a batch is computed in"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary"""
    learning_rate: float | None = None
    """peak learning rate"""
    warmup: int | None = None
    """steps of linear warm-up (default: a tenth of the run, at most 1000)"""
    final_learning_rate: float = Settings.final_learning_rate
    """where the cosine ends, as a share of the peak"""
    weight_decay: float = Settings.weight_decay
    """decoupled weight decay, on matrices"""
    b1: float = Settings.b1
    """AdamW's first decay rate"""
    b2: float = Settings.b2
    """AdamW's second decay rate"""
    eps: float = Settings.eps
    """AdamW's epsilon, and the preconditioner's"""
    clip_norm: float = Settings.clip_norm
    """clip the final gradient to this global norm; 0 for no clipping"""
    dropout: float = 0.0
    """after the embedding, attention and MLP"""
    label_smoothing: float = Settings.label_smoothing
    """share of the target that is spread over the vocabulary"""
    z_loss: float = Settings.z_loss
    """factor of the squared log-normaliser in the loss (1e-4 is usual)"""
    soft_cap: float = Settings.soft_cap
    """cap c of the logits c tanh(u/c); 0 for none"""
    ema: float = Settings.ema
    """decay of an average of the weights, which is what evaluation then sees; 0 for none"""
    tied: bool = True
    """one matrix for input embedding and head"""
    dtype: str = Settings.dtype
    """what the model computes in: float32, or bfloat16 over float32 masters; torch also float16, with a loss scale"""
    backend: str = Settings.backend
    """auto, xla (jax), torch (torch)"""
    data_parallel: int = Settings.data_parallel
    """devices with whole replicas of the model, each with its own sequences"""
    fsdp: int = Settings.fsdp
    """devices that share weights and moments out, each with its own sequences"""
    tensor_parallel: int = Settings.tensor_parallel
    """devices that share out heads, MLP and vocabulary for the same sequences"""
    compile: bool = Settings.compile
    """torch: the blocks by torch.compile, which takes a minute at the start"""
    remat: bool = Settings.remat
    """activation checkpointing: less memory, and every backward pass runs the blocks' forward pass once more"""
    sync: str = Settings.sync
    """whose gradient ε follows: global, the whole batch's, or local, that of each replica's own part (m-sharpness)"""
    evaluate_every: int | None = None
    """steps between evaluations (default: a tenth of the run)"""
    evaluation_batches: int = Pace.evaluation_batches
    """batches of held-out text an evaluation reads"""
    checkpoint_every: int | None = None
    """steps between checkpoints (default: a tenth of the run)"""
    keep: int = Pace.keep
    """checkpoints kept"""
    out: Path | None = None
    """folder of the run; a run that was interrupted there goes on (default: under runs/)"""
    json: Path | None = None
    """also write the figures here"""
    quiet: bool = False
    """no progress on stderr"""

    def settings(self, method: str, seed: int) -> Settings:
        """These options for one method and seed.

        Raises:
            UserError: naming the option that is wrong.
        """
        size = preset(self.preset)
        model = size.model(seq_len=self.seq_len, vocab_size=self.vocab_size, tied=self.tied, dropout=self.dropout)
        batch = size.batch if self.batch is None else self.batch
        if self.steps is not None and self.tokens_per_param is not None:
            raise UserError(f"--steps {self.steps} and --tokens-per-param {self.tokens_per_param}: give one of the two")
        if self.tokens_per_param is not None:
            steps = steps_for(self.tokens_per_param, model, batch)
        else:
            steps = DEFAULT_STEPS if self.steps is None else self.steps
        if self.savings not in SAVINGS:
            raise UserError(f"--savings: {self.savings!r} is not known; use one of {', '.join(SAVINGS)}")
        training = ("framework", "micro_batches", "final_learning_rate", "weight_decay", "b1", "b2", "eps", "clip_norm")
        perturbation = ("rho_schedule", "norm", "second_moment", "ascent", "scope", "backend")
        schedule = ("every", "start", "probability", "between", "ema", "dtype")
        head = ("cotangent", "label_smoothing", "z_loss", "soft_cap")
        named = (*training, *perturbation, *schedule, *head, *HOW, "sync")
        same: dict[str, Any] = {name: getattr(self, name) for name in named}
        same |= SAVINGS[self.savings]
        if self.cut is not None:
            same["cut"] = self.cut
        for name in ("correction_fraction", "ascent_fraction"):
            if getattr(self, name) is not None:
                same[name] = _fraction(f"--{name.replace('_', '-')}", getattr(self, name))
        return Settings(
            method=method,
            model=model,
            steps=steps,
            batch=batch,
            seed=seed,
            learning_rate=size.learning_rate if self.learning_rate is None else self.learning_rate,
            warmup=min(1000, steps // 10) if self.warmup is None else self.warmup,
            rho=size.rho if self.rho is None else self.rho,
            **same,
        )

    def pace(self, steps: int) -> Pace:
        """How often such a run of `steps` evaluates and saves."""
        tenth = max(1, steps // 10)
        return Pace(
            evaluate_every=tenth if self.evaluate_every is None else self.evaluate_every,
            checkpoint_every=tenth if self.checkpoint_every is None else self.checkpoint_every,
            evaluation_batches=self.evaluation_batches,
            keep=self.keep,
            probe_steps=getattr(self, "probe_steps", 0),
        )


def _fraction(option: str, text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{option} must be a number in (0, 1], 1/8 say; got {text!r}") from None


@dataclass(frozen=True)
class Train(Common):
    """Train one model with one method; run again with the same options, it goes on where it was interrupted."""

    method: str = "precond-functional-sam"
    """adamw, sam, precond-sam, functional-sam, precond-functional-sam, logit-sam"""
    seed: int = 0
    """of the initial weights, the order of the data and dropout"""
    probe_steps: int = Pace.probe_steps
    """AdamW steps timed before training, for the cost ratio; 0 for none"""


@dataclass(frozen=True)
class Compare(Common):
    """Train several methods on the same data and budget: one table, one plot, one HTML report."""

    methods: str = "adamw,precond-functional-sam"
    """names as in `fsam train --method`, between commas, with options of their own if any: sam:rho=0.1:start=0.5"""
    budget: Literal["steps", "time", "flops"] = "steps"
    """what is equal for all: optimizer steps, the time that AdamW takes for --steps, or its FLOPs by the cost model"""
    seeds: int = 1
    """runs of each method, with seeds 0, 1, …"""
    cost_steps: int = 12
    """steps of each method timed turn about, for the cost ratio"""

    def variants(self) -> dict[str, Settings]:
        """Each method as it was written, once, and its settings.

        Raises:
            UserError: for an unknown method or option.
        """
        found = dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip())
        unknown = [name for name in found if name.partition(":")[0] not in NAMES]
        if unknown or not found:
            raise UserError(f"--methods: {', '.join(unknown) or 'none given'}; use some of {', '.join(NAMES)}")
        return {name: self._variant(name) for name in found}

    def _variant(self, text: str) -> Settings:
        method, *options = text.split(":")
        # "scope=top:2" has a colon of its own.
        joined: list[str] = []
        for option in options:
            if "=" in option or not joined:
                joined.append(option)
            else:
                joined[-1] += f":{option}"
        given = {}
        for option in joined:
            name, equals, value = option.partition("=")
            name = name.replace("-", "_")
            if not equals or name not in VARIED:
                known = ", ".join(x.replace("_", "-") for x in VARIED)
                raise UserError(f"--methods: {option!r} in {text!r} is no option=value; the options are {known}")
            given[name] = _typed(text, name, value)
        return dataclasses.replace(self, **given).settings(method, 0)


# What the methods of one comparison may differ in, by option.
VARIED = (
    "learning_rate", "warmup", "final_learning_rate", "weight_decay", "b1", "b2", "eps", "clip_norm", "dropout", "ema",
    "rho", "rho_schedule", "norm", "second_moment", "savings", "correction_fraction", "ascent", "ascent_fraction",
    "scope", "cut", "every", "start", "probability", "between", "cotangent", "label_smoothing", "z_loss",
)  # fmt: skip


def _typed(text: str, name: str, value: str) -> Any:
    kind = next(field.type for field in dataclasses.fields(Common) if field.name == name)
    number = {"int": int, "float": float}.get(str(kind).partition(" ")[0])
    if number is None:
        return value
    try:
        return number(value)
    except ValueError:
        raise UserError(f"--methods: {name}={value} in {text!r} is no {number.__name__}") from None


@dataclass(frozen=True)
class Backends:
    """What is installed, what `auto` picks, and why."""

    json: Path | None = None
    """also write the table here"""


@dataclass(frozen=True)
class Profile:
    """Where time and bytes go: step, trace, parameters (here), tpu, gpu (their compilers), check, report."""


Command = (
    Annotated[Cost, tyro.conf.subcommand("cost")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Backends, tyro.conf.subcommand("backends")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
)


def parse(arguments: list[str] | None = None) -> Train | Compare | Cost | Backends | Profile:
    """The command line as one of the above; prints help or a usage error and exits (0 or 2) by itself."""
    return tyro.cli(Command, prog="fsam", args=arguments)


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["fsam", *sys.argv[1:]])
