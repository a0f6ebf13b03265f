"""The cost of a run: its kinds of steps, their shares, and the option sets within a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsam_core.cost.machines import Machine
from fsam_core.cost.products import Model, Options
from fsam_core.cost.steps import Collectives, StepCost, Work, step
from fsam_core.errors import UserError
from fsam_core.regions import REGIONS, Region
from fsam_core.schedules import Kind

# Option sets by name, as fields of `Options`.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"fraction": 1 / 4},
    "split": {"form": "split", "ascent": "rest", "fraction": 1 / 2},
    "cheap": {"fraction": 1 / 8, "cut": "hidden"},
}


@dataclass(frozen=True)
class Cost:
    """The cost of the steps of a run, on one device.

    Attributes:
        options: the options whose cost this is.
        adamw: an AdamW step, the unit of the ratios.
        steps: the cost of each kind of step, also of kinds that the schedule excludes.
        shares: the share of each kind in the run.
    """

    options: Options
    adamw: StepCost
    steps: Mapping[Kind, StepCost]
    shares: Mapping[Kind, float]

    def mean(self, figure: Callable[[StepCost], Any]) -> Any:
        """A figure of the run's average step."""
        first, *others = [figure(self.steps[kind]) * share for kind, share in self.shares.items()]
        return sum(others, first)

    @property
    def flops(self) -> float:
        return self.mean(lambda x: x.flops)

    @property
    def regions(self) -> dict[Region, Work]:
        present = {name for kind in self.shares for name in self.steps[kind].regions}
        return {name: self.mean(lambda x: x.regions.get(name, Work())) for name in REGIONS if name in present}

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.adamw.flops

    def seconds(self, machine: Machine) -> float:
        return self.mean(machine.seconds)

    def time_ratio(self, machine: Machine) -> float:
        return self.seconds(machine) / machine.seconds(self.adamw)

    @property
    def peak_bytes(self) -> float:
        """The peak memory over all steps of the run."""
        return max(self.steps[kind].peak_bytes for kind in self.shares)

    @property
    def collectives(self) -> Collectives:
        rows = [[share * x for x in self.steps[kind].collectives] for kind, share in self.shares.items()]
        return Collectives(*(sum(column) for column in zip(*rows, strict=True)))


def estimate(model: Model, options: Options, tokens: float) -> Cost:
    """The cost of `options` on `model` with `tokens` tokens a step, over all devices and micro-batches.

    Raises:
        UserError: for tokens that are not > 0, or a scope of more blocks than the model has.
    """
    if not tokens > 0:
        raise UserError(f"tokens must be > 0, got {tokens!r}")
    plain = dataclasses.replace(options, path="base", between="plain", ascent="full", ascent_fraction=None)
    adamw = step(model, plain, tokens, "plain")
    kinds: tuple[Kind, ...] = ("corrected", "plain", "reused") if options.between == "reuse" else ("corrected", "plain")
    steps = {kind: step(model, options, tokens, kind) for kind in kinds}
    return Cost(options, adamw, steps, options.shares)


EXACT = Options()

# The search space of `within`: all combinations of one entry from each row. An entry is (the index of the next entry
# that saves less, or None; fields of `Options`); "half" stands for the upper half of the blocks.
_Row = tuple[tuple[int | None, dict[str, Any]], ...]
_GRID: tuple[_Row, ...] = (
    tuple((i - 1 if i else None, {"fraction": q}) for i, q in enumerate((1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16))),
    ((None, {}), (0, {"cut": "hidden"})),
    ((None, {}), (0, {"scope": "half"})),
    ((None, {}), (0, {"ascent": "momentum"})),
    (
        (None, {}),
        (0, {"every": 2}),
        (1, {"every": 4}),
        (0, {"start": 0.5}),
        (3, {"start": 0.75}),
        (4, {"start": 0.9}),
    ),
)


def within(
    budget: float,
    model: Model,
    machine: Machine,
    options: Options = EXACT,
    *,
    tokens: float,
    spare: bool = True,
    kept: Collection[str] = (),
    settled: Callable[[Options], Options] = lambda options: options,
) -> list[tuple[dict[str, Any], Cost]]:
    """The option sets that cost at most `budget` times AdamW's time, cheapest first, as (fields of `Options`, cost).

    They combine a fraction, the hidden cut, the top half of the blocks, the momentum ascent and a schedule, as far as
    `options` allows them. The momentum ascent is only for the exact correction, whose base backward pass it removes; a
    part of the batch needs that pass.

    Args:
        budget: the time of the average step relative to AdamW's, ≥ 1.
        options: the fields that all sets share: the path, micro-batches, dtype, devices, framework.
        tokens: tokens a step.
        spare: include sets that would stay within the budget without one of their savings, or with less of it.
        kept: fields that have the value of `options` in every set.
        settled: what a step would decide by itself from its options: whether it keeps its cotangent. A UserError of it
            leaves the set out.

    Raises:
        UserError: for a budget below 1, or for AdamW itself.
    """
    if not budget >= 1:
        raise UserError(f"budget must be a number >= 1, as a multiple of AdamW's time (1.15, say); got {budget!r}")
    if options.path == "base":
        raise UserError("budget: AdamW has no correction to spend it on; name one of the other methods")
    searched = [row for row in _GRID if not any(name in kept for _, entry in row for name in entry)]
    found: dict[tuple[int, ...], tuple[dict[str, Any], Cost]] = {}
    for places in itertools.product(*(range(len(row)) for row in searched)):
        rows = zip(searched, places, strict=True)
        changes: dict[str, Any] = {name: x for row, place in rows for name, x in row[place][1].items()}
        if not _goes(changes, model, options):
            continue
        if "scope" in changes:
            changes["scope"] = f"top:{model.layers // 2}"
        try:
            asked = settled(dataclasses.replace(options, **changes))
        except UserError:  # a split step of the whole batch, say
            continue
        cost = estimate(model, asked, tokens)
        if cost.time_ratio(machine) <= budget:
            found[places] = changes, cost
    ours = [one for at, one in found.items() if spare or not any(x in found for x in _giving_up_less(searched, at))]
    return sorted(ours, key=lambda x: x[1].time_ratio(machine))


def _goes(changes: dict[str, Any], model: Model, options: Options) -> bool:
    fraction = changes.get("fraction", options.fraction)
    parts = fraction * options.micro_batches
    return not (
        ("ascent" in changes and fraction < 1)
        or ("scope" in changes and (model.layers < 2 or options.path == "logit"))
        or (parts > 1 and parts % 1)
    )


def _giving_up_less(rows: Sequence[_Row], places: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for i, place in enumerate(places):
        less = rows[i][place][0]
        if less is not None:
            yield (*places[:i], less, *places[i + 1 :])
