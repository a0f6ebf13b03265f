"""What the study trains: regimes, and in each the rows that are compared, as data.

A row is a method with the options that it fixes and at most one that is tuned. In every regime AdamW's learning rate is
tuned first, then its weight decay; then each other row, by itself and on top of that decay, each time with a ρ of its
own. Tuning has a seed that is not among those of the results, so that no difference is one of selection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fsam_core import Perturbed, cost
from fsam_trainers.config import Settings
from fsam_trainers.cost_table import counted, options_of
from fsam_trainers.models.layout import ModelConfig

TUNING_SEED = 1000
LEADING_SEEDS = 5
SAME_PRICE = 1.02  # a row that costs no more times AdamW is at equal time as it is
FUNCTIONAL = "precond-functional-sam"
SMALL = ModelConfig(layers=4, width=64, heads=4, seq_len=128, vocab_size=2048)  # 336k parameters
SMALLEST = replace(SMALL, layers=2, width=32)  # 94k
SPLIT: dict[str, Any] = {"form": "split", "ascent": "rest"}
RHOS = (0.05, 0.1, 0.2, 0.4)


class Row(NamedTuple):
    """A method, the options it fixes, and the one that is tuned with its first values."""

    method: str
    fixed: dict[str, Any]
    tunes: str = "rho"
    values: tuple[float, ...] = RHOS


ADAMW, DECAY = "AdamW", "AdamW, weight decay"
# The rows without a tuned decay; what a user would try first.
RIVALS = {
    ADAMW: Row("adamw", {}, "learning_rate", (1e-3, 2e-3, 4e-3, 8e-3)),
    DECAY: Row("adamw", {}, "weight_decay", (0.3, 1.0, 3.0, 10.0)),
    "AdamW, dropout": Row("adamw", {}, "dropout", (0.05, 0.1, 0.2, 0.4)),
}
# What fewer steps do by themselves: the rows at equal time have them, too.
FEWER = {
    "10 % fewer steps": Row("adamw", {"more": -0.1}, "", ()),
    "half of the steps": Row("adamw", {"more": -0.5}, "", ()),
}
AVERAGE = {"average of the weights": Row("adamw", {"ema": 0.98}, "", ())}
# ε of the noise has so many times the length of one along the gradient.
NOISE = {"noise": Row("sam", {"ascent": "random"}, values=(0.5, 1.0, 2.0, 4.0))}
WHOLE = {
    "SAM": Row("sam", {}),
    "precond-SAM": Row("precond-sam", {}),
    "functional": Row(FUNCTIONAL, {}),
}
PART = {f"functional, {q}": Row(FUNCTIONAL, {"correction_fraction": 1 / int(q[-1])}) for q in ("1/2", "1/4", "1/8")}
SPLITS = {
    f"{name}, split {q}": Row(method, SPLIT | {"correction_fraction": 1 / int(q[-1])})
    for name, method in (("precond-SAM", "precond-sam"), ("functional", FUNCTIONAL))
    for q in ("1/2", "1/4")
}
LAST_QUARTER = {"last quarter": Row(FUNCTIONAL, {"start": 0.75})}
OTHERS = {
    "momentum": Row(FUNCTIONAL, {"ascent": "momentum"}),
    **LAST_QUARTER,
    "ASAM": Row("sam", {"norm": "dual", "adaptive": True}, values=(0.5, 1.0, 2.0, 4.0)),
}
# What else makes the functional method cheaper.
EIGHTHS = {
    "1/8, hidden cut": Row(FUNCTIONAL, {"correction_fraction": 1 / 8, "cut": "hidden"}),
    "1/8, part's ascent": Row(FUNCTIONAL, {"correction_fraction": 1 / 8, "ascent": "part"}),
}
SAVINGS = EIGHTHS | {
    "hidden cut": Row(FUNCTIONAL, {"cut": "hidden"}),
    "upper half of the blocks": Row(FUNCTIONAL, {"scope": "top:2"}),
    "previous ascent": Row(FUNCTIONAL, {"ascent": "previous"}),
    "every 4th step": Row(FUNCTIONAL, {"every": 4}),
    "every 4th, reused between": Row(FUNCTIONAL, {"every": 4, "between": "reuse"}),
}
PERTURBED = NOISE | WHOLE | PART | SPLITS | OTHERS
SOME = {name: PERTURBED[name] for name in ("noise", "SAM", "functional", "functional, 1/4", "precond-SAM, split 1/2")}
FUNCTIONALS = {name: PERTURBED[name] for name in ("functional", "functional, 1/4")}
MORE = SOME | {name: PERTURBED[name] for name in ("precond-SAM", "functional, split 1/4")}


def _fixed(method: str, rho: float = 0.0, **options: Any) -> Row:
    return Row(method, options | ({"rho": rho} if rho else {}), "", ())


# Of the last 8 % of a run; ρ is not tuned there, as what it is for is not the loss.
LATE = {
    ADAMW: _fixed("adamw"),
    "2.5 % more steps": _fixed("adamw", more=0.025),
    "8 % more steps": _fixed("adamw", more=0.08),
    "decay to 10 %": _fixed("adamw", final_learning_rate=0.1),
    "average of the weights": _fixed("adamw", ema=0.998),
    "noise": _fixed("sam", 3.1, ascent="random"),
    "SAM": _fixed("sam", 0.15),
    "functional, 1/4": _fixed(FUNCTIONAL, 0.3, correction_fraction=1 / 4),
    "SAM, split 1/2": _fixed("sam", 0.3, **SPLIT, correction_fraction=1 / 2),
    "precond-SAM, split 1/2": _fixed("precond-sam", 0.6, **SPLIT, correction_fraction=1 / 2),
    "SAM, split 1/4": _fixed("sam", 0.2, **SPLIT, correction_fraction=1 / 4),
    "training at 4 bits": _fixed("sam", 1.0, ascent="quantised:4", norm="none"),
}
# ρ is tuned in shorter runs; whether a longer one wants a larger ρ.
LARGER = {f"functional, ρ {rho}": _fixed(FUNCTIONAL, rho) for rho in (0.1, 0.2)}
# What mattered for the smaller model, to see whether it holds for a larger one, with the same ρ.
LATE_AGAIN = {
    name: LATE[name]
    for name in (
        ADAMW, "8 % more steps", "average of the weights", "noise", "SAM", "functional, 1/4", "SAM, split 1/2",
        "training at 4 bits",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """One setting in which rows are compared.

    Attributes:
        title: for the page.
        data: "python", "packages", or "prose" (`study_data`).
        max_tokens: of training text; None for all of it.
        evaluations: along a run.
        rivals: AdamW with one of its own options tuned. The learning rate is also that of all other rows.
        alone, on_decay: rows by themselves, and on top of the tuned decay.
        equal_time: rows of `alone` that are trained with fewer steps, too, if they cost more than AdamW. Where AdamW's
            loss falls to the end, only those that are better with as many steps: others are not with fewer.
        base: AdamW's own run that each run starts from: its steps, data and tokens.
        late: the share of the base's steps that each run repeats, from the base's checkpoint; 0 for a run of its own.
        tuning_rho: the length of the runs that tune ρ, relative to that of the others. AdamW's options have runs of the
            whole length: 0.3 was the best decay of 1,220 steps, and worse than 1e-4 in 4,880.
        seeds: of each row.
        leading: the rows that have `LEADING_SEEDS`: those in front, and what they are compared with.
    """

    title: str
    model: ModelConfig
    data: str
    max_tokens: int | None
    steps: int
    batch: int = 8
    evaluations: int = 5
    rivals: dict[str, Row] = field(default_factory=lambda: RIVALS)
    alone: dict[str, Row] = field(default_factory=dict)
    on_decay: dict[str, Row] = field(default_factory=dict)
    equal_time: dict[str, Row] = field(default_factory=dict)
    base: tuple[str, int | None, int] | None = None
    late: float = 0.0
    tuning_rho: float = 1.0
    seeds: int = 3
    leading: tuple[str, ...] = ()

    def seeds_of(self, label: str) -> range:
        """The seeds of a row's runs."""
        return range(LEADING_SEEDS if label in self.leading else self.seeds)


REGIMES = {
    "scarce": Regime(
        "Many passes over 8,000 tokens", SMALL, "python", 8_000, 160,
        alone=FEWER | AVERAGE | PERTURBED | SAVINGS, on_decay=AVERAGE | PERTURBED | EIGHTHS,
        equal_time=PERTURBED | SAVINGS,
        leading=(
            ADAMW, DECAY, "AdamW, dropout", "SAM", "functional, 1/4", "functional, 1/8", *FEWER,
            *(f"{name}{how}" for name in EIGHTHS for how in ("", ", equal time")),
        ),
    ),
    "repeated": Regime(
        "Seven passes over 100,000 tokens", SMALL, "python", 100_000, 700,
        alone=AVERAGE | PERTURBED, on_decay=AVERAGE | SOME | LAST_QUARTER, equal_time=LAST_QUARTER,
        leading=(ADAMW, DECAY, "last quarter", "last quarter, on decay", "last quarter, equal time"),
    ),
    "one-pass": Regime(
        "One pass over 5 million tokens", SMALL, "packages", 5_000_000, 4_880,
        rivals={ADAMW: RIVALS[ADAMW], DECAY: RIVALS[DECAY]}, alone=FUNCTIONALS | LARGER | SOME | LAST_QUARTER | AVERAGE,
        tuning_rho=1 / 4,
        leading=(ADAMW, DECAY, *FUNCTIONALS, "SAM", "precond-SAM, split 1/2"),
    ),
    "fine-tuning": Regime(
        "Fine-tuning: 16 passes over 8,000 tokens of prose, from a base trained on Python", SMALL, "prose", 8_000, 125,
        rivals=RIVALS | {ADAMW: Row("adamw", {}, "learning_rate", (2.5e-4, 5e-4, 1e-3, 2e-3))},
        base=("python", 1_000_000, 2_000),
        alone=FEWER | AVERAGE | MORE, on_decay=AVERAGE | MORE, equal_time=FUNCTIONALS,
        leading=(
            ADAMW, DECAY, *FEWER, *(f"{x}{how}" for x in FUNCTIONALS for how in ("", ", on decay", ", equal time")),
        ),
    ),
    "late": Regime(
        "The last 8 % of a run of 217 tokens a parameter", SMALLEST, "packages", 20_500_000, 20_000,
        evaluations=4, rivals={}, alone=LATE, base=("packages", 20_500_000, 20_000), late=0.08,
        leading=(ADAMW, "average of the weights", "noise", "SAM", "functional, 1/4", "SAM, split 1/2"),
    ),
    "late-larger": Regime(
        "The last 8 % of a larger model's run of 30 tokens a parameter", SMALL, "packages", 10_250_000, 10_000,
        evaluations=4, rivals={}, alone=LATE_AGAIN, base=("packages", 10_250_000, 10_000), late=0.08,
        leading=(ADAMW, "noise", "SAM", "functional, 1/4", "SAM, split 1/2"),
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A row of a regime's table: what it trains, and whether on top of the tuned decay, or in AdamW's time."""

    label: str
    row: Row
    on_decay: bool = False
    equal_time: bool = False


def entries(regime: Regime) -> Iterator[Entry]:
    """All rows in the order in which they are trained."""
    for label, row in (regime.rivals | regime.alone).items():
        yield Entry(label, row)
    for label, row in regime.on_decay.items():
        yield Entry(f"{label}, on decay", row, on_decay=True)
    for label, row in regime.equal_time.items():
        if cost_ratio(settings_of(regime, row, {}, 0)) > SAME_PRICE:
            yield Entry(f"{label}, equal time", row, equal_time=True)


def settings_of(regime: Regime, row: Row, values: dict[str, float], seed: int, steps: int | None = None) -> Settings:
    """A run's settings; `values` are tuned ones, and what the row fixes takes precedence."""
    chosen: dict[str, Any] = {"learning_rate": 4e-3, "rho": 0.1, **values, **row.fixed}
    count = round((steps or regime.steps) * (1 + chosen.pop("more", 0.0)))
    late: dict[str, Any] = {}
    if regime.late:
        share = 1 - regime.steps * (1 - regime.late) / count
        late = {"learning_rate_schedule": "wsd", "decay": share, "final_learning_rate": 0.0, "start": 1 - share}
    model = replace(regime.model, dropout=chosen.pop("dropout", 0.0))
    kind = AdaptiveSettings if chosen.pop("adaptive", False) else Settings
    warmup = {"warmup": min(1000, count // 10)}
    return kind("torch", row.method, model, count, regime.batch, seed=seed, **warmup | late | chosen)


def base_settings(regime: Regime, seed: int) -> Settings:
    """AdamW's run that the regime's runs of a seed start from."""
    assert regime.base is not None
    _, _, steps = regime.base
    one = settings_of(replace(regime, steps=steps), Row("adamw", {}, "", ()), {}, seed)
    return replace(one, model=replace(one.model, dropout=0.0))


@dataclass(frozen=True)
class AdaptiveSettings(Settings):
    """ASAM, which has no name on the command line."""

    def as_method(self, learning_rate_at: Any = None) -> Any:
        method = super().as_method(learning_rate_at)
        assert isinstance(method, Perturbed)
        return replace(method, precondition="weights")


def cost_ratio(settings: Settings) -> float:
    """Operations of a step relative to AdamW's, by the cost model; the mean over a run's steps."""
    found = cost.estimate(counted(settings.model, "torch"), options_of(settings, "cpu"), settings.tokens_per_step)
    return found.flops_ratio


def at_equal_time(regime: Regime, settings: Settings) -> int:
    """As many steps as the regime's of AdamW pay for."""
    return max(1, math.floor(regime.steps / cost_ratio(settings)))
