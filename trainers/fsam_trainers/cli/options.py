"""The options that `fsam train` and `fsam compare` share, and how they become `Settings` and `Intervals`.

tyro reads the dataclasses themselves. Their checks run afterwards, so that a wrong value is reported in one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import tyro

from fsam_core import UserError, backends
from fsam_core.errors import check_choice
from fsam_trainers import device, pretrained, processes, registry
from fsam_trainers.cli.config_file import expanded
from fsam_trainers.cli.image_options import of_images
from fsam_trainers.cli.parsing import parsed
from fsam_trainers.config import SAVINGS, Intervals, Settings, steps_for
from fsam_trainers.console import Console
from fsam_trainers.files import writable
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.presets import DEFAULT_PRESETS, preset
from fsam_trainers.resuming import BranchPoint

DEFAULT_STEPS = 300
TENTHS = ("evaluate_every", "checkpoint_every")  # intervals that are a tenth of the run where none is given


@dataclass(frozen=True)
class Basis:
    """Options that determine the defaults of others; parsed first."""

    task: Literal["text", "images"] = "text"
    """text: a decoder, or images: a Vision Transformer, whose options `--task images --help` lists"""
    preset: str | None = None
    """model size: tiny, or the paper's 2m, 24m, 43m, 118m, 1208m; of images vit-tiny, vit-s16, vit-b16"""
    savings: str = "exact"
    """options by name: exact, balanced (--correction-fraction 1/4), cheap (1/8, --cut hidden), split (1/2)"""


@dataclass(frozen=True)
class _InitFrom:
    """Parsed first: the model's sizes are those of the source."""

    init_from: str | None = None


class _Model(ModelConfig):
    def __post_init__(self) -> None:
        """Checked later, in `Common.settings`."""


class RunIntervals(Intervals):
    """`Intervals` before their checks."""

    def __post_init__(self) -> None:
        """Checked later, in `Common.intervals_of`."""


@dataclass(frozen=True)
class RunOptions(Settings):
    """`Settings` before their checks."""

    model: tyro.conf.OmitArgPrefixes[_Model]

    def __post_init__(self) -> None:
        """Checked later, in `Common.settings`."""


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str = "python"
    """python (its own sources), text, .jsonl[.gz|.zst], .parquet, a folder or glob of these, .bin, hf:NAME[:CONFIG]"""
    stream: Literal["auto", "yes", "no"] = "auto"
    """make tokens while training, without reading all first (auto: hf: and over 1 GB, if there is no --max-tokens)"""
    shuffle_buffer: int = 2048
    """with a stream, sequences that are shuffled together"""
    data_workers: int | None = None
    """with a stream, tokenizing processes a rank (default: one fewer than cores, 1 to 4); 0: none but the run's own"""
    tokenizer: Path | None = None
    """a tokenizer.json or a SentencePiece .model (default: that of --init-from, or a BPE trained on the data)"""
    text_column: str | None = None
    """of rows, the column of text (default: text, content, or prompt,answer), or two: question,reply"""
    token_dtype: str | None = None
    """of .bin files that do not state it, the type of the ids: uint16, uint32, int32, int64"""
    max_tokens: int | None = None
    """read at most this many training tokens"""


@dataclass(frozen=True, kw_only=True)
class Common(Basis):
    """Options of the commands that train."""

    run: tyro.conf.OmitArgPrefixes[RunOptions]
    """what determines the result"""
    corpus: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    intervals: tyro.conf.OmitArgPrefixes[RunIntervals] = field(default_factory=RunIntervals)
    tokens_per_param: float | None = None
    """instead of --steps: tokens for each non-embedding parameter (Chinchilla: about 20)"""
    config: Path | None = None
    """TOML file with options, which those of the command line override; every run writes its own, OUT/config.toml"""
    out: Path | None = None
    """folder of the run; a run that was interrupted there is resumed (default: under runs/)"""
    json: Path | None = None
    """also write the figures here"""
    quiet: bool = False
    """no progress on stderr"""
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()
    RUN: ClassVar[type[RunOptions]] = RunOptions
    INTERVALS: ClassVar[type[RunIntervals]] = RunIntervals

    @property
    def given(self) -> set[str]:
        """The names of the options on the command line."""
        return {x[2:].partition("=")[0].replace("-", "_") for x in self.arguments if x.startswith("--")}

    def model(self) -> ModelConfig:
        """The model's sizes.

        Raises:
            UserError: for sizes that do not fit together.
        """
        return ModelConfig(**vars(self.run.model))

    def settings(self, **changes: Any) -> Settings:
        """The run's settings with these changes, after defaults that depend on other options were resolved.

        Raises:
            UserError: naming the option that is wrong.
        """
        model = self.model()
        steps = self.run.steps
        if self.tokens_per_param is not None:
            if "steps" in self.given:
                raise UserError(f"--steps {steps} and --tokens-per-param {self.tokens_per_param}: give one of the two")
            steps = steps_for(self.tokens_per_param, model, self.run.batch)
        warmup = self.run.warmup if "warmup" in self.given else min(1000, steps // 10)
        return Settings(**{**vars(self.run), "model": model, "steps": steps, "warmup": warmup, **changes})

    def intervals_of(self, steps: int, usual: int | None = None) -> Intervals:
        """The intervals of a run of so many steps; `usual` where none is given, by default a tenth of the run."""
        usual = max(1, steps // 10) if usual is None else usual
        return Intervals(**{**vars(self.intervals), **dict.fromkeys(set(TENTHS) - self.given, usual)})

    def recorded(self) -> dict[str, Any]:
        """Options for config.toml, besides settings and intervals."""
        return {"task": self.task, "preset": self.preset, **vars(self.corpus)}

    def load_corpus(self, settings: Settings, console: Console) -> Any:
        """The corpus; one process of each host prepares it, the others read the cache."""
        from fsam_trainers.data import load

        backends.require(*backends.TRAINING[settings.framework])  # before minutes of tokenizing
        given, tokenizer = self.corpus, self.corpus.tokenizer
        if settings.init_from is not None:
            source = pretrained.find(settings.init_from, "--init-from")
            tokenizer = source.tokenizer_for(given.data, tokenizer, given.text_column)
        found = processes.current().first_on_host(
            lambda: load(
                given.data,
                stream=given.stream,
                vocab_size=settings.model.vocab_size,
                seq_len=settings.model.seq_len,
                tokenizer=tokenizer,
                max_tokens=given.max_tokens,
                text_column=given.text_column,
                token_dtype=given.token_dtype,
                buffer=given.shuffle_buffer,
                workers=given.data_workers,
            )
        )
        console.say(found.description)
        return found

    def folder(self, name: str) -> Path:
        """The folder of the run: --out, or runs/`name`."""
        out = self.out or Path("runs") / name
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is a file; give the name of a folder")
        return out


@dataclass(frozen=True, kw_only=True)
class Branching(Common):
    """Options of commands whose runs may start from another run's checkpoint."""

    branch_from: str | None = None
    """RUN@STEP: start from this checkpoint of another run, with its options where no others are given"""

    def start(self) -> BranchPoint | None:
        """The checkpoint of --branch-from.

        Raises:
            UserError: for text that is not RUN@STEP.
        """
        return None if self.branch_from is None else BranchPoint.parse(self.branch_from)

    def recorded(self) -> dict[str, Any]:
        return {**super().recorded(), "branch_from": self.branch_from}


def check_backend(settings: Settings, console: Console) -> None:
    """Check that the backend can be used, before minutes of other work; say so where it will be slow.

    Raises:
        UserError: as `backends.choose`.
    """
    chosen = backends.choose(settings.framework, settings.backend)
    if chosen.name == "pallas" and device.platform("jax") != "tpu":
        console.warn("--backend pallas: there is no TPU here, so its kernels run in the interpreter, slowly")


Command = TypeVar("Command", bound=Common)


def run_alone(
    command: type[Command], arguments: Sequence[str], prog: str, run: Callable[[Command, Console], int], instead: str
) -> int:
    """Run a command that trains one run after the other in one process; returns the exit code.

    Args:
        instead: what to give to a launcher of several processes.

    Raises:
        UserError: as `parse`, for a --json that cannot be written, and under a launcher of several processes.
    """
    options = parse(command, arguments, prog)
    if options.json is not None:
        writable("--json", options.json)
    with registry.joined(options.run.framework) as here:
        if here.count > 1:
            raise UserError(f"{prog} takes one process; give torchrun {instead}")
        return run(options, Console(options.quiet))


def _other(task: str) -> str:
    return "text" if task == "images" else "images"


def parse(command: type[Command], arguments: Sequence[str], prog: str) -> Command:
    """The options of `command`; prints help and exits by itself.

    Raises:
        UserError: as `parsed`, for a preset or savings that are not known, and for a wrong --config.
    """
    commands: dict[str, Any] = {"text": command, "images": of_images(command)}  # type: ignore[arg-type]
    arguments = expanded(commands, arguments, prog)
    basis = parsed(Basis, arguments, prog, ignore_unknown=True)
    name = basis.preset or DEFAULT_PRESETS[basis.task]
    basis, size = dataclasses.replace(basis, preset=name), preset(name, basis.task)
    command = commands[basis.task]
    check_choice("--savings", basis.savings, SAVINGS)
    start = parsed(_InitFrom, arguments, prog, ignore_unknown=True)
    kind: Any = get_type_hints(command.RUN)["model"]
    model = kind(**size.sizes)
    source = None if start.init_from is None else pretrained.find(start.init_from, "--init-from")
    if source is not None:
        if not issubclass(kind, type(source.config)):
            raise UserError(f"{source.where} is a {source.config.FAMILY}; it takes --task {_other(basis.task)}")
        model = kind(**{**vars(source.config), "dropout": 0.0})
    usual: dict[str, Any] = {"learning_rate": size.learning_rate, "rho": size.rho, **SAVINGS[basis.savings]}
    usual |= {"steps": DEFAULT_STEPS, "warmup": DEFAULT_STEPS // 10, "batch": size.batch, "model": model}
    usual |= {} if source is None else {"soft_cap": source.soft_cap}
    run = command.RUN(framework="jax", method="precond-functional-sam", **usual)
    intervals = command.INTERVALS(evaluate_every=DEFAULT_STEPS // 10, checkpoint_every=DEFAULT_STEPS // 10)
    default = command(**vars(basis), run=run, intervals=intervals)
    found = dataclasses.replace(parsed(command, arguments, prog, default=default), arguments=tuple(arguments))
    if source is not None:  # before anything is tokenized or timed
        pretrained.check_sizes(source, found.model())
    return found
