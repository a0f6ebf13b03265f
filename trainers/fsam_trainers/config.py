"""Everything that determines a training run, checked once, and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from fsam_core import Method, UserError, cost, named, schedules
from fsam_core.methods import Cut, Norm, Perturbed, SecondMoment, check_rho
from fsam_core.schedules import Between, Schedule, cosine, tied
from fsam_kernels.memory import Form
from fsam_kernels.options import Loss
from fsam_trainers.models.layout import ModelConfig

Framework = Literal["jax", "torch"]
Dtype = Literal["float32", "bfloat16", "float16"]
Sync = Literal["global", "local"]
RhoSchedule = Literal["constant", "cosine", "learning-rate"]
# On which devices a run computes, and not what: a checkpoint may be gone on from with others.
PLACEMENT = ("data_parallel", "fsdp", "tensor_parallel")
# What changes the result no more than rounding does.
HOW = (*PLACEMENT, "compile", "remat")
# Option sets by name; what is given beside one is taken on top of it.
SAVINGS: dict[str, dict[str, Any]] = {
    name: {"correction_fraction" if option == "fraction" else option: value for option, value in options.items()}
    for name, options in cost.PRESETS.items()
}


@dataclass(frozen=True)
class Settings:
    """A run: two runs with equal settings and equal data end in the same weights, to the bit on one machine.

    Attributes:
        framework: "jax" or "torch".
        method: a name from `fsam_core.NAMES`.
        model: the decoder's sizes.
        steps: optimizer steps.
        batch: sequences a step, over all micro-batches.
        micro_batches: how many parts a batch is computed in; divides `batch`.
        seed: of the initial weights, the order of the data and dropout.
        learning_rate: the peak, reached after `warmup` steps, then a cosine down to `final_learning_rate` times it.
        clip_norm: global norm of the final gradient; 0 for no clipping.
        rho, norm, second_moment, correction_fraction, ascent, ascent_fraction, scope, cut: see
            `fsam_core.methods.Perturbed`.
        rho_schedule: ρ "constant", along a "cosine" down to 0 at the end of the run, or in proportion to the
            "learning-rate".
        every, probability, between: see `fsam_core.schedules.Schedule`; the seed is the run's.
        start: the share of the run before which there is no correction.
        ema: decay of an exponential average of the weights, which is then what evaluation sees; 0 for none.
        dtype: what the model computes in: "float32", or "bfloat16" over float32 masters, from which the perturbation is
            taken too; in PyTorch also "float16", with a loss scale.
        cotangent: "auto", "keep" or "recompute", see `fsam_kernels.memory.Memory`.
        label_smoothing, z_loss, soft_cap: of the loss that is trained, see `fsam_kernels.options.Loss`; soft_cap 0 for
            none. Evaluation reports the plain cross entropy of the (capped) logits.
        backend: "auto", or a backend of the framework.
        data_parallel, fsdp, tensor_parallel: devices along each axis of the mesh, see `fsam_trainers.placement`. They
            change the result no more than rounding does, and a run may go on with others.
        compile: in PyTorch, the blocks by torch.compile. In JAX the step is compiled anyway.
        remat: activation checkpointing: of each block only the input is kept, and a backward pass computes the rest
            again.
        sync: "global", or "local": each of `data_parallel` replicas ascends the gradient of its own sequences
            (m-sharpness). Their number is then part of the method.

    Raises:
        UserError: naming the command-line option that is wrong.
    """

    framework: Framework
    method: str
    model: ModelConfig
    steps: int
    batch: int
    micro_batches: int = 1
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 0
    final_learning_rate: float = 0.1
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    rho: float = 0.5
    norm: Norm = "l2"
    second_moment: SecondMoment = "current"
    correction_fraction: float = 1.0
    ascent: str = "full"
    ascent_fraction: float | None = None
    scope: str = "all"
    cut: Cut = "logits"
    rho_schedule: RhoSchedule = "constant"
    every: int = 1
    start: float = 0.0
    probability: float = 1.0
    between: Between = "plain"
    ema: float = 0.0
    dtype: Dtype = "float32"
    cotangent: Form = "auto"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float = 0.0
    backend: str = "auto"
    data_parallel: int = 1
    fsdp: int = 1
    tensor_parallel: int = 1
    compile: bool = False
    remat: bool = False
    sync: Sync = "global"

    def __post_init__(self) -> None:
        _check(self.framework in get_args(Framework), "--framework", self.framework, "jax or torch")
        _check(self.steps >= 1, "--steps", self.steps, "at least 1")
        _check(self.batch >= 1, "--batch", self.batch, "at least 1")
        _check(self.micro_batches >= 1, "--micro-batches", self.micro_batches, "at least 1")
        divides = f"a number that divides --batch {self.batch}"
        _check(self.batch % self.micro_batches == 0, "--micro-batches", self.micro_batches, divides)
        _check(0 <= self.seed < 2**32, "--seed", self.seed, "between 0 and 2**32 - 1")
        _check(0 < self.learning_rate < math.inf, "--learning-rate", self.learning_rate, "a finite number > 0")
        _check(self.warmup >= 0, "--warmup", self.warmup, "at least 0")
        _check(0 <= self.final_learning_rate <= 1, "--final-learning-rate", self.final_learning_rate, "in [0, 1]")
        _check(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "a finite number >= 0")
        _check(0 <= self.b1 < 1, "--b1", self.b1, "in [0, 1)")
        _check(0 <= self.b2 < 1, "--b2", self.b2, "in [0, 1)")
        _check(0 < self.eps < math.inf, "--eps", self.eps, "a finite number > 0")
        _check(0 <= self.clip_norm < math.inf, "--clip-norm", self.clip_norm, "a finite number >= 0 (0: no clipping)")
        check_rho(self.rho, "--rho")
        choices = ", ".join(get_args(RhoSchedule))
        _check(self.rho_schedule in get_args(RhoSchedule), "--rho-schedule", self.rho_schedule, choices)
        _check(0 <= self.start <= 1, "--start", self.start, "a share of the run, in [0, 1]")
        _check(0 <= self.ema < 1, "--ema", self.ema, "in [0, 1) (0: none)")
        _check(self.dtype in get_args(Dtype), "--dtype", self.dtype, " or ".join(get_args(Dtype)))
        has_scale = self.framework == "torch" and self.fsdp == self.tensor_parallel == 1
        works = "float32 or bfloat16 there: float16's loss scale is PyTorch's, without --fsdp and --tensor-parallel"
        _check(self.dtype != "float16" or has_scale, "--dtype", self.dtype, works)
        _check(self.cotangent in get_args(Form), "--cotangent", self.cotangent, "auto, keep or recompute")
        _check(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "in [0, 1)")
        _check(0 <= self.z_loss < math.inf, "--z-loss", self.z_loss, "a finite number >= 0")
        _check(0 <= self.soft_cap < math.inf, "--soft-cap", self.soft_cap, "a finite number >= 0 (0: no cap)")
        for axis in PLACEMENT:
            _check(getattr(self, axis) >= 1, f"--{axis.replace('_', '-')}", getattr(self, axis), "at least 1")
        _check(self.sync in get_args(Sync), "--sync", self.sync, "global or local")
        q = self.correction_fraction
        _check(0 < q <= 1, "--correction-fraction", q, "in (0, 1], 1/8 say")
        method = self.as_method()
        self.schedule()
        top = int(self.scope.partition(":")[2]) if self.scope.startswith("top:") else 0
        _check(top <= self.model.layers, "--scope", self.scope, f"at most top:{self.model.layers}, the model's blocks")
        schedules.check(self.schedule(), method)
        if isinstance(method, Perturbed):
            self._check_share("--correction-fraction", method.fraction)
            if method.direction.source == "part":
                self._check_share("--ascent-fraction", method.share)

    def _check_share(self, option: str, q: float) -> None:
        """Whether that share of the batch is whole sequences, the same in each micro-batch."""
        fits = f"a share that cuts --batch {self.batch} into whole sequences, and into the same in each micro-batch"
        cut = (Fraction(q).limit_denominator(1 << 16) * self.micro_batches) % 1
        _check((self.batch // self.micro_batches) % cut.denominator == 0, option, q, fits)

    def as_method(self, learning_rate_at: Callable[[Any], Any] | None = None) -> Method:
        """The method; `learning_rate_at` is the schedule as the framework has it, `learning_rate_at` without it."""
        names = ("norm", "second_moment", "ascent", "ascent_fraction", "scope", "cut", "seed")
        options = {name: getattr(self, name) for name in names}
        rho: Any = self.rho
        if self.rho_schedule == "cosine":
            rho = cosine(self.rho, self.steps)
        elif self.rho_schedule == "learning-rate":
            rho = tied(self.rho, learning_rate_at or self.learning_rate_at, self.learning_rate)
        return named(self.method, rho, argument="--method", fraction=self.correction_fraction, **options)

    def schedule(self) -> Schedule:
        """At which steps there is a correction."""
        start = math.ceil(self.start * self.steps)
        return Schedule(self.every, start, self.probability, self.seed, self.between)

    def kind(self, step: int) -> str:
        """What step `step` = 0, 1, … is: corrected, reused or plain."""
        return "plain" if self.method == "adamw" else self.schedule().kind(step)

    def losses(self) -> tuple[Loss, Loss]:
        """(the loss that is trained, the one that is reported)."""
        cap = self.soft_cap or None
        return Loss(self.label_smoothing, self.z_loss, cap), Loss(soft_cap=cap)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.model.seq_len

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step 0, 1, …: linear warm-up from 0, then a cosine over the rest."""
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and reports."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Pace:
    """How often things beside training happen, in steps; 0 means only at the end. None of it changes the weights.

    Attributes:
        evaluate_every: steps between evaluations.
        evaluation_batches: batches an evaluation reads, always the first ones of the held-out text.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        probe_steps: AdamW steps timed before training, for the ratio in the progress bar; 0 for none.
    """

    evaluate_every: int = 0
    evaluation_batches: int = 16
    checkpoint_every: int = 0
    keep: int = 2
    probe_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "checkpoint_every", "probe_steps"):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "at least 0")
        for name in ("evaluation_batches", "keep"):
            _check(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")


def steps_for(tokens_per_param: float, model: ModelConfig, batch: int) -> int:
    """Steps that see `tokens_per_param` tokens for each non-embedding parameter (Chinchilla's rule: about 20).

    Raises:
        UserError: when the ratio is not a finite number > 0.
    """
    _check(0 < tokens_per_param < math.inf, "--tokens-per-param", tokens_per_param, "a finite number > 0")
    _check(batch >= 1, "--batch", batch, "at least 1")
    return math.ceil(tokens_per_param * model.non_embedding_parameters / (batch * model.seq_len))


def difference(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """The first few settings in which two `as_dict`s differ, as text; "" where they agree."""
    mine, other = ({**x, **{f"model.{k}": v for k, v in x["model"].items()}} for x in (mine, other))
    same = set(HOW) - ({"data_parallel"} if mine["sync"] == "local" else set())
    names = [k for k in mine if k not in ("model", *same) and mine[k] != other.get(k)]
    return ", ".join(f"{k} {other.get(k)!r} (now {mine[k]!r})" for k in names[:4])


def _check(good: bool, option: str, got: Any, works: str) -> None:
    if not good:
        raise UserError(f"{option} must be {works}, got {got!r}")
