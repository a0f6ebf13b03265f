"""Everything that determines a training run, checked once; the command reads its options from here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fsam_core import Method, UserError, cost, named, schedules, split
from fsam_core.methods import Cut, Norm, NormFrom, Perturbed, SecondMoment, check_rho
from fsam_core.methods import Form as StepForm
from fsam_core.schedules import Between, Schedule, cosine, tied
from fsam_kernels.memory import Form
from fsam_kernels.options import Loss
from fsam_trainers.metrics import Log
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.models.vit_layout import kind_of

Framework = Literal["jax", "torch"]
Dtype = Literal["float32", "bfloat16", "float16"]
Sync = Literal["global", "local"]
RhoSchedule = Literal["constant", "cosine", "learning-rate"]
RateSchedule = Literal["cosine", "wsd"]
DecayShape = Literal["linear", "1-sqrt"]
# On which devices a run computes, and not what: a checkpoint may be resumed with others.
PLACEMENT = ("data_parallel", "fsdp", "tensor_parallel")
# What changes the result no more than rounding does.
NUMERICS_NEUTRAL = (*PLACEMENT, "compile", "remat")
# How a run ends, and not how it begins: an existing run may be continued to another end (`resuming.py`).
END = ("steps", "learning_rate_schedule", "final_learning_rate", "decay", "decay_shape")
# How tyro reads a field: as text. `Settings` checks the choices, because tyro's message is not one sentence.
TEXT = PrimitiveConstructorSpec(
    nargs=1,
    metavar="STR",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)
SHARE: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="SHARE",
    instance_from_str=lambda words: _share(words[0]),
    is_instance=lambda value: value is None or isinstance(value, float),
    str_from_instance=lambda value: [str(value)],
)
# Option sets by name; options that are given as well override them.
SAVINGS: dict[str, dict[str, Any]] = {
    name: {"correction_fraction" if option == "fraction" else option: value for option, value in options.items()}
    for name, options in cost.PRESETS.items()
}


@dataclass(frozen=True)
class Settings:
    """A run: two runs with equal settings and equal data end in the same weights, to the bit on one machine.

    `cli/options.py` makes the command's options of these fields; the text under each field is the option's help.

    Raises:
        UserError: naming the command-line option that is wrong.
    """

    framework: Annotated[Framework, TEXT]
    """jax or torch"""
    method: str
    """adamw, sam, precond-sam, functional-sam, precond-functional-sam, logit-sam"""
    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    """the decoder's sizes"""
    steps: int
    """optimizer steps"""
    batch: int
    """sequences a step, over all micro-batches"""
    micro_batches: int = 1
    """parts a batch is computed in"""
    seed: int = 0
    """of the initial weights, the order of the data and dropout"""
    init_from: str | None = None
    """weights to start from: RUN or RUN@STEP, a folder of safetensors (this project's or transformers'), or hf:NAME"""
    learning_rate: float = 1e-3
    """peak learning rate, reached after --warmup steps"""
    warmup: int = 0
    """steps of linear warm-up (of a run by the command: a tenth, at most 1000)"""
    learning_rate_schedule: Annotated[RateSchedule, TEXT, tyro.conf.arg(aliases=["--schedule"])] = "cosine"
    """after the warm-up: cosine to the end, or wsd: constant, then a decay over the last --decay of the run"""
    decay: float = 0.2
    """with wsd, share of the run in which the learning rate decays; 0 for none"""
    decay_shape: Annotated[DecayShape, TEXT] = "linear"
    """with wsd, how it decays: linear, or 1-sqrt (faster at first)"""
    final_learning_rate: float = 0.1
    """where the cosine or the decay ends, as a share of the peak"""
    weight_decay: float = 1e-4
    """decoupled weight decay, on matrices"""
    b1: float = 0.9
    """AdamW's first decay rate"""
    b2: float = 0.95
    """AdamW's second decay rate"""
    eps: float = 1e-8
    """AdamW's epsilon, and the preconditioner's"""
    clip_norm: float = 1.0
    """clip the final gradient to this global norm; 0 for no clipping"""
    rho: float = 0.5
    """length of the perturbation, in the units of the weights"""
    norm: Annotated[Norm, TEXT] = "l2"
    """l2: rho d / |d|; dual: rho d / sqrt(g.d); per-tensor: l2 of each tensor by itself"""
    norm_from: Annotated[NormFrom, TEXT] = "current"
    """norms that scale the perturbation: current; previous: those of the step before, for which nothing waits"""
    second_moment: Annotated[SecondMoment, TEXT] = "current"
    """current: this step's gradient is folded in; previous: the optimizer's as it stands"""
    correction_fraction: Annotated[float, SHARE] = 1.0
    """share of the batch that the second pass is computed on: 1/8, 0.25"""
    form: Annotated[StepForm, TEXT] = "correction"
    """correction: of the whole batch's gradient; split: at AdamW's price, with --ascent rest (docs/methods.md)"""
    ascent: str = "full"
    """where the perturbation comes from: full, part, micro (each its own), rest, previous, momentum, random, ..."""
    ascent_fraction: Annotated[float | None, SHARE] = None
    """with --ascent part, the share of the batch whose gradient it is (default: the correction's)"""
    scope: str = "all"
    """which weights are perturbed: all, no-head, norms, or top:K, the K last blocks and what stands above"""
    cut: Annotated[Cut, TEXT] = "logits"
    """where the functional method holds the cotangent: logits, or hidden (a second pass without the vocabulary)"""
    rho_schedule: Annotated[RhoSchedule, TEXT] = "constant"
    """constant, cosine (down to 0 at the end), or learning-rate (in proportion to it)"""
    every: int = 1
    """a correction each k-th step"""
    start: float = 0.0
    """share of the run before which there is none"""
    probability: float = 1.0
    """of a correction at a step that could have one"""
    between: Annotated[Between, TEXT] = "plain"
    """steps without one are plain, or reuse the last"""
    ema: float = 0.0
    """decay of an average of the weights, which is what evaluation then sees; 0 for none"""
    dtype: Annotated[Dtype, TEXT] = "float32"
    """what the model computes in: float32, or bfloat16 over float32 masters; torch also float16, with a loss scale"""
    cotangent: Annotated[Form, TEXT] = "auto"
    """how the logit cotangent waits for the second pass: auto, keep (more memory), recompute"""
    label_smoothing: float = 0.0
    """share of the target that is spread over the vocabulary; in the trained loss, not in the reported one"""
    z_loss: float = 0.0
    """factor of the squared log-normaliser in the trained loss (1e-4 is usual)"""
    soft_cap: float = 0.0
    """cap c of the logits c tanh(u/c); 0 for none"""
    backend: str = "auto"
    """auto, xla or pallas (jax), torch or triton (torch)"""
    data_parallel: int = 1
    """devices with whole replicas of the model, each with its own sequences"""
    fsdp: int = 1
    """devices that share weights and moments out, each with its own sequences"""
    tensor_parallel: int = 1
    """devices that share out heads, MLP and vocabulary for the same sequences"""
    compile: bool = False
    """torch: the blocks by torch.compile, which takes a minute at the start"""
    remat: bool = False
    """activation checkpointing: less memory, and every backward pass runs the blocks' forward pass once more"""
    sync: Annotated[Sync, TEXT] = "global"
    """whose gradient ε follows: global, the whole batch's, or local, that of each replica's own part (m-sharpness)"""

    def __post_init__(self) -> None:
        must(self.framework in get_args(Framework), "--framework", self.framework, "jax or torch")
        must(self.steps >= 1, "--steps", self.steps, "at least 1")
        must(self.batch >= 1, "--batch", self.batch, "at least 1")
        must(self.micro_batches >= 1, "--micro-batches", self.micro_batches, "at least 1")
        divides = f"a number that divides --batch {self.batch}"
        must(self.batch % self.micro_batches == 0, "--micro-batches", self.micro_batches, divides)
        must(0 <= self.seed < 2**32, "--seed", self.seed, "between 0 and 2**32 - 1")
        must(0 < self.learning_rate < math.inf, "--learning-rate", self.learning_rate, "a finite number > 0")
        must(self.warmup >= 0, "--warmup", self.warmup, "at least 0")
        choices, schedule = " or ".join(get_args(RateSchedule)), self.learning_rate_schedule
        must(schedule in get_args(RateSchedule), "--schedule", schedule, choices)
        must(0 <= self.decay <= 1, "--decay", self.decay, "a share of the run, in [0, 1]")
        choices = " or ".join(get_args(DecayShape))
        must(self.decay_shape in get_args(DecayShape), "--decay-shape", self.decay_shape, choices)
        must(0 <= self.final_learning_rate <= 1, "--final-learning-rate", self.final_learning_rate, "in [0, 1]")
        must(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "a finite number >= 0")
        must(0 <= self.b1 < 1, "--b1", self.b1, "in [0, 1)")
        must(0 <= self.b2 < 1, "--b2", self.b2, "in [0, 1)")
        must(0 < self.eps < math.inf, "--eps", self.eps, "a finite number > 0")
        must(0 <= self.clip_norm < math.inf, "--clip-norm", self.clip_norm, "a finite number >= 0 (0: no clipping)")
        check_rho(self.rho, "--rho")
        choices = ", ".join(get_args(RhoSchedule))
        must(self.rho_schedule in get_args(RhoSchedule), "--rho-schedule", self.rho_schedule, choices)
        must(0 <= self.start <= 1, "--start", self.start, "a share of the run, in [0, 1]")
        must(0 <= self.ema < 1, "--ema", self.ema, "in [0, 1) (0: none)")
        must(self.dtype in get_args(Dtype), "--dtype", self.dtype, " or ".join(get_args(Dtype)))
        has_scale = self.framework == "torch" and self.fsdp == self.tensor_parallel == 1
        works = "float32 or bfloat16 there: float16's loss scale is PyTorch's, without --fsdp and --tensor-parallel"
        must(self.dtype != "float16" or has_scale, "--dtype", self.dtype, works)
        must(self.cotangent in get_args(Form), "--cotangent", self.cotangent, "auto, keep or recompute")
        must(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "in [0, 1)")
        must(0 <= self.z_loss < math.inf, "--z-loss", self.z_loss, "a finite number >= 0")
        must(0 <= self.soft_cap < math.inf, "--soft-cap", self.soft_cap, "a finite number >= 0 (0: no cap)")
        for axis in PLACEMENT:
            must(getattr(self, axis) >= 1, f"--{axis.replace('_', '-')}", getattr(self, axis), "at least 1")
        must(self.sync in get_args(Sync), "--sync", self.sync, "global or local")
        q = self.correction_fraction
        must(not isinstance(q, str) and 0 < q <= 1, "--correction-fraction", q, "in (0, 1], 1/8 say")
        q_ascent = self.ascent_fraction
        must(not isinstance(q_ascent, str), "--ascent-fraction", q_ascent, "a number in (0, 1], 1/8 say")
        method = self.as_method()
        self.schedule()
        top = int(self.scope.partition(":")[2]) if self.scope.startswith("top:") else 0
        must(top <= self.model.layers, "--scope", self.scope, f"at most top:{self.model.layers}, the model's blocks")
        schedules.check(self.schedule(), method)
        if isinstance(method, Perturbed):
            self._check_share("--correction-fraction", method.fraction)
            if method.direction.source == "part":
                self._check_share("--ascent-fraction", method.share)

    def _check_share(self, option: str, q: float) -> None:
        fits = f"a share that cuts --batch {self.batch} into whole sequences, and into the same in each micro-batch"
        must(self.is_cut_at(q), option, q, fits)

    def is_cut_at(self, q: float) -> bool:
        """Whether this share of the batch is whole sequences, the same number in each micro-batch."""
        cut = (split.ratio(q) * self.micro_batches) % 1
        return (self.batch // self.micro_batches) % cut.denominator == 0

    def as_method(self, learning_rate_at: Callable[[Any], Any] | None = None) -> Method:
        """The method. `learning_rate_at`: the framework's own schedule, by default `Settings.learning_rate_at`."""
        names = ("norm", "norm_from", "second_moment", "form", "ascent", "ascent_fraction", "scope", "cut", "seed")
        options = {name: getattr(self, name) for name in names}
        rho: Any = self.rho
        if self.rho_schedule == "cosine":
            rho = cosine(self.rho, self.steps)
        elif self.rho_schedule == "learning-rate":
            rho = tied(self.rho, learning_rate_at or self.learning_rate_at, self.learning_rate)
        return named(self.method, rho, argument="--method", fraction=self.correction_fraction, **options)

    def schedule(self) -> Schedule:
        """Which steps have a correction."""
        start = math.ceil(self.start * self.steps)
        return Schedule(self.every, start, self.probability, self.seed, self.between)

    def kind(self, step: int) -> str:
        """The kind of the step after `step` completed ones: corrected, reused or plain."""
        return "plain" if self.method == "adamw" else self.schedule().kind(step)

    def losses(self) -> tuple[Loss, Loss]:
        """(the loss that is trained, the one that is reported)."""
        cap = self.soft_cap or None
        return Loss(self.label_smoothing, self.z_loss, cap), Loss(soft_cap=cap)

    @property
    def tokens_per_step(self) -> int:
        """Rows of the head: of images, the images."""
        return self.batch * self.model.rows

    @property
    def decay_start(self) -> int:
        """The first step of the decay of "wsd"; before it nothing depends on the run's length."""
        return max(self.warmup, self.steps - math.ceil(self.decay * self.steps))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate after `step` completed steps: linear warm-up from 0, then the schedule."""
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        floor = self.final_learning_rate
        start = self.warmup if self.learning_rate_schedule == "cosine" else self.decay_start
        progress = min(max(step - start, 0) / max(self.steps - start, 1), 1.0)
        if self.learning_rate_schedule == "cosine":
            return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        return self.learning_rate * (1 - (1 - floor) * (progress if self.decay_shape == "linear" else progress**0.5))

    def rho_at(self, step: int) -> float:
        """The length of the perturbation after `step` completed steps, if that step has a correction."""
        rho = getattr(self.as_method(), "rho", 0.0)
        return float(rho(step) if callable(rho) else rho)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and reports."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Intervals:
    """What a run reports and saves, and how often in steps; 0 means only at the end. None of it changes the weights."""

    evaluate_every: int = 0
    """steps between evaluations (of a run by the command: a tenth of it)"""
    evaluation_batches: int = 16
    """batches of held-out text an evaluation reads, always the first ones"""
    checkpoint_every: int = 0
    """steps between checkpoints (of a run by the command: a tenth of it)"""
    keep: int = 2
    """checkpoints kept"""
    correction_every: int = 0
    """steps between measurements of |ĝ - g| / |g| and of the cosine of ĝ and g, of three passes each; 0 for none"""
    sharpness_every: int = 0
    """steps between measurements of the shares of H g (docs/sharpness.md) on a batch of held-out text; 0 for none"""
    probe_steps: int = 5
    """AdamW steps timed before training, for the cost ratio; 0 for none"""
    log: Annotated[Log, TEXT] = "jsonl"
    """where the metrics go besides OUT/metrics.jsonl: jsonl (nowhere), tensorboard (OUT/tensorboard), or wandb"""

    def __post_init__(self) -> None:
        must(self.log in get_args(Log), "--log", self.log, ", ".join(get_args(Log)))
        for name in ("evaluate_every", "checkpoint_every", "correction_every", "sharpness_every", "probe_steps"):
            must(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "at least 0")
        for name in ("evaluation_batches", "keep"):
            must(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")


def steps_for(tokens_per_param: float, model: ModelConfig, batch: int) -> int:
    """Steps that see `tokens_per_param` tokens for each non-embedding parameter (Chinchilla's rule: about 20).

    Raises:
        UserError: when the ratio is not a finite number > 0.
    """
    must(0 < tokens_per_param < math.inf, "--tokens-per-param", tokens_per_param, "a finite number > 0")
    must(batch >= 1, "--batch", batch, "at least 1")
    return math.ceil(tokens_per_param * model.non_embedding_parameters / (batch * model.rows))


def _share(text: str) -> float | str:
    """1/8 -> 0.125; text that is no number is returned, and `Settings` refuses it."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return text


def difference(mine: dict[str, Any], other: dict[str, Any], ignored: Container[str] = ()) -> str:
    """The first few settings in which two `as_dict`s differ, as text; "" if they agree.

    A setting that `other` does not have is younger than it: it then had the default.
    """
    mine, other = ({**x, **{f"model.{k}": v for k, v in x["model"].items()}} for x in (mine, other))
    defaults = {f"model.{f.name}": f.default for f in dataclasses.fields(kind_of(mine["model"]))}
    other = {f.name: f.default for f in dataclasses.fields(Settings)} | defaults | other
    same = set(NUMERICS_NEUTRAL) - ({"data_parallel"} if mine["sync"] == "local" else set())
    names = [k for k in mine if k not in ("model", *same) and k not in ignored and mine[k] != other.get(k)]
    return ", ".join(f"{k} {other.get(k)!r} (now {mine[k]!r})" for k in names[:4])


def must(good: bool, option: str, got: Any, works: str) -> None:
    """
    Raises:
        UserError: where it is not good: the option must be what works.
    """
    if not good:
        raise UserError(f"{option} must be {works}, got {got!r}")
