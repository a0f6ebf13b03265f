"""An all-pairs array of the step's options: a few rows in which every pair of levels that go together occurs.

The full product has some 50,000 rows. An error in what two options do to each other shows in some row all the same.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

Row = dict[str, Any]

LEVELS: dict[str, list[Any]] = {
    "kind": ["functional", "sam", "logit"],
    "fraction": [1.0, 0.5],
    "strength": [1.0, 0.7],
    "form": ["correction", "split"],
    "combine": ["no", "gsam"],
    "ascent": ["full", "part", "half", "micro", "rest", "previous", "momentum", "vasso"],
    "cut": ["logits", "hidden"],
    "scope": ["all", "norms", "top:2", "named"],
    "norm": ["l2", "per-tensor", "dual", "none"],
    "norm_from": ["current", "previous"],
    "precondition": ["none", "adam", "adam-previous", "weights"],
    "clip_norm": [None, 0.3],
    "batches": ["one", "equal", "ragged"],
    "head": ["linear", "all options", "logits"],
    "stages": ["whole", "staged"],
    "cotangent": ["keep", "recompute"],
}


# Where the prefix of a staged model is shared, another function computes the step: these levels with the rest fixed.
SHARED_PREFIX: dict[str, list[Any]] = LEVELS | {
    "kind": ["functional", "sam"],
    "form": ["correction"],
    "combine": ["no"],
    "ascent": ["full", "part", "-momentum", "vasso"],
    "scope": ["top:2"],
    "norm": ["l2"],
    "precondition": ["none", "adam"],
    "batches": ["one"],
    "head": ["linear", "all options"],
    "stages": ["staged"],
}


def goes_together(row: Row) -> bool:
    """Whether a method may have these options; `row` may hold some of them alone."""
    hidden, micro = row.get("cut") == "hidden", row.get("ascent") == "micro"
    split = row.get("form") == "split"
    waits = row.get("ascent", "rest") in ("full", "part", "half", "micro", "vasso")
    last = row.get("norm_from") == "previous"
    combines = row.get("combine") == "gsam"
    inexact = row.get("fraction", 1) != 1 or row.get("strength", 1) != 1 or split
    inexact = inexact or row.get("ascent", "full") not in ("full", "vasso")
    return not (
        (combines and inexact)
        or (last and (row.get("norm", "l2") in ("none", "per-tensor") or micro))
        or (split and (row.get("kind") == "logit" or row.get("fraction") == 1 or row.get("strength", 1) != 1 or waits))
        or (row.get("ascent") == "rest" and (row.get("form") == "correction" or row.get("kind") == "logit"))
        or (row.get("ascent") == "rest" and (row.get("fraction") == 1 or row.get("strength", 1) != 1))
        or (hidden and row.get("kind", "functional") != "functional")
        or (hidden and row.get("head") == "logits")
        or (micro and (row.get("fraction", 1) != 1 or row.get("strength", 1) != 1))
        or (row.get("ascent") == "half" and row.get("fraction", 1) != 1)
    )


def pairs_of(row: Row) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(LEVELS, 2)}


def all_pairs(levels: dict[str, list[Any]] = LEVELS) -> set[tuple[Any, ...]]:
    """Every pair of levels that go together."""
    every = {(a, x, b, y) for a, b in itertools.combinations(levels, 2) for x in levels[a] for y in levels[b]}
    return {(a, x, b, y) for a, x, b, y in every if goes_together({a: x, b: y})}


def rows(levels: dict[str, list[Any]] = LEVELS, seed: int = 2, draws: int = 60) -> list[Row]:
    """The array, the same each time: of some rows that hold an uncovered pair, the one that covers most is taken."""
    draw, found = random.Random(seed), []
    uncovered = sorted(all_pairs(levels), key=str)
    while uncovered:
        drawn = [_row_with(draw.choice(uncovered), levels, draw) for _ in range(draws)]
        best = max(drawn, key=lambda row: len(pairs_of(row).intersection(uncovered)))
        found.append(best)
        covered = pairs_of(best)
        uncovered = [pair for pair in uncovered if pair not in covered]
    return found


def _row_with(pair: tuple[Any, ...], levels: dict[str, list[Any]], draw: random.Random) -> Row:
    while True:
        row = {name: draw.choice(choices) for name, choices in levels.items()} | {pair[0]: pair[1], pair[2]: pair[3]}
        if goes_together(row):
            return row
