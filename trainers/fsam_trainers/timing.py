"""The cost of a step relative to an AdamW step of the same model: measured in one process, interleaved."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fsam_trainers import device, registry
from fsam_trainers.config import Settings
from fsam_trainers.data.batches import Batch

Name = TypeVar("Name", bound=Hashable)


class RelativeCost(NamedTuple):
    """Milliseconds of a step and its ratio to AdamW's, each the median with its 20th and 80th percentile."""

    step_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


def base_step_ms(settings: Settings, batch: Batch, repeats: int) -> float:
    """Median milliseconds of an AdamW step with these settings, on a temporary model."""
    times = _timed({"adamw": as_adamw(settings)}, batch, repeats, lambda: None)
    return statistics.median(times["adamw"])


def measure(
    variants: Mapping[str, Settings],
    batch: Batch,
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, RelativeCost]:
    """Cost of each variant's average step over its run, and of "adamw", relative to AdamW in the first one's settings.

    All models exist at once and their steps are interleaved, so a machine that slows down slows them all; each ratio is
    between two neighbouring steps. Each kind of step of a schedule is timed separately and weighted by its share of the
    run; a plain step costs what AdamW's does. `tick` is called after every step.
    """
    timed: dict[Any, Settings] = {"adamw": as_adamw(next(iter(variants.values())))}
    timed |= {(name, kind): step for name, one in variants.items() for kind, (_, step) in kinds_of(one).items()}
    times = _timed(timed, batch, repeats, tick)
    base = np.array(times["adamw"])
    found = {"adamw": relative_cost(times["adamw"], times["adamw"])}
    for name, one in variants.items():
        kinds = {kind: share for kind, (share, _) in kinds_of(one).items()}
        mean = (1 - sum(kinds.values())) * base
        mean = sum((share * np.array(times[name, kind]) for kind, share in kinds.items()), mean)
        found[name] = relative_cost(mean.tolist(), times["adamw"])
    return found


def kinds_of(settings: Settings) -> dict[str, tuple[float, Settings]]:
    """Each kind of step that is not plain -> (its share of the run, settings under which all steps are of it).

    For a method that never corrects it is the plain step, whose unused machinery has a cost as well.
    """
    steps = [settings.kind(i) for i in range(settings.steps)]
    if settings.method != "adamw" and set(steps) == {"plain"}:
        return {"plain": (1.0, settings)}
    always = dataclasses.replace(settings, every=1, start=0.0, probability=1.0, between="plain")
    after_one = dataclasses.replace(settings, every=settings.steps, start=0.0, probability=1.0)
    pure = {"corrected": always, "reused": after_one}
    return {kind: (steps.count(kind) / len(steps), one) for kind, one in pure.items() if kind in steps}


def timed_steps(variants: Mapping[str, Settings]) -> int:
    """How many steps `measure` times in one round."""
    return 1 + sum(len(kinds_of(one)) for one in variants.values())


def relative_cost(milliseconds: Sequence[float], base: Sequence[float]) -> RelativeCost:
    """The cost of steps relative to the base steps that were interleaved with them."""
    low, middle, high = (float(x) for x in np.percentile(np.array(milliseconds) / np.array(base), (20, 50, 80)))
    return RelativeCost(statistics.median(milliseconds), middle, low, high)


def as_adamw(settings: Settings) -> Settings:
    return dataclasses.replace(settings, method="adamw")


def interleaved(
    runs: Mapping[Name, Callable[[int], Any]],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
    *,
    warm_up: int = 2,
    wait: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Milliseconds of `repeats` calls of each with the index of the round, interleaved, after `warm_up` rounds.

    Args:
        tick: called after every call.
        wait: returns when the device has done its work; called before and after each call.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for index in range(warm_up + repeats):
        for name, run in runs.items():
            wait()
            began = time.perf_counter()
            run(index)
            wait()
            if index >= warm_up:
                times[name].append(1000 * (time.perf_counter() - began))
            tick()
    return times


def _timed(
    variants: Mapping[Name, Settings], batch: Batch, repeats: int, tick: Callable[[], None]
) -> dict[Name, list[float]]:
    """Milliseconds of steps of each variant on the same batch, interleaved."""
    engines = {name: registry.make(settings) for name, settings in variants.items()}
    for model in engines.values():
        model.prepare(batch)
    stepped = lambda model: lambda index: model.step(batch, index)()
    wait = device.waiting({settings.framework for settings in variants.values()})
    times = interleaved({name: stepped(model) for name, model in engines.items()}, repeats, tick, wait=wait)
    del engines
    gc.collect()
    return times
