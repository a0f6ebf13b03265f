"""Every pair of the step's options in both frameworks, against the formula of ĝ in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import option_array
import pytest
from formula import Formula
from problems import FRAMEWORKS, batch_of, distance
from stacks import IGNORED, LOSS, got, hidden, holds, model, staged, weights

from fsam_core import SAM, FunctionalSAM, LogitSAM
from fsam_core.combining import gsam
from fsam_kernels.memory import Memory

pytestmark = pytest.mark.usefixtures("float64")
KINDS = {"sam": SAM, "functional": FunctionalSAM, "logit": LogitSAM}
ROWS = option_array.rows()
SHARED_PREFIX = option_array.rows(option_array.SHARED_PREFIX)
BATCHES = {
    "one": [batch_of(12, 1)],
    "equal": [batch_of(8, 1), batch_of(8, 4, ignored=0.5)],
    "ragged": [batch_of(6, 1), batch_of(4, 2), batch_of(8, 3, ignored=0.5)],
}


def method_of(row: option_array.Row) -> Any:
    ascent = {"half": {"ascent": "part", "ascent_fraction": 0.5}}.get(row["ascent"], {"ascent": row["ascent"]})
    precondition = {
        "none": {},
        "adam": {"precondition": "adam"},
        "adam-previous": {"precondition": "adam", "second_moment": "previous"},
        "weights": {"precondition": "weights", "eta": 0.1},
    }[row["precondition"]]
    scope = (lambda name: name.endswith("_a")) if row["scope"] == "named" else row["scope"]
    same = {name: row[name] for name in ("fraction", "strength", "form", "cut", "norm", "norm_from")}
    combine = {"combine": gsam(0.3)} if row["combine"] == "gsam" else {}
    rho = 0.4 if row["norm"] != "none" else 3.0
    return KINDS[row["kind"]](rho, scope=scope, **same, **ascent, **precondition, **combine)


def batches_of(row: option_array.Row) -> list[dict]:
    """Micro-batches; with token weights where the head has all options."""
    batches = BATCHES[row["batches"]]
    if row["head"] != "all options":
        return batches
    random = np.random.default_rng(0)
    return [{**batch, "weights": random.uniform(size=len(batch["y"]))} for batch in batches]


def test_array_covers_all_pairs_of_options():
    for rows, levels in ((ROWS, option_array.LEVELS), (SHARED_PREFIX, option_array.SHARED_PREFIX)):
        assert set().union(*map(option_array.pairs_of, rows)) >= option_array.all_pairs(levels)
        assert all(map(option_array.goes_together, rows))
    assert len(ROWS) <= 40  # an array of these levels has at least 32 rows


def cases() -> Iterator[Any]:
    """Every row in PyTorch; in JAX, where each is compiled for a second or more, `make test` has every fourth."""
    for i, row in enumerate([*ROWS, *SHARED_PREFIX]):
        name = "-".join(map(str, row.values()))
        for framework in FRAMEWORKS:
            marks = [pytest.mark.slow] if framework == "jax" and i % 4 else []
            yield pytest.param(framework, row, marks=marks, id=f"{name}-{framework}")


@pytest.mark.parametrize(("framework", "row"), cases())
def test_gradient_is_its_formula(framework, row):
    method, batches, head = method_of(row), batches_of(row), row["head"]
    options = {"loss": LOSS, "ignore_index": IGNORED} if head == "all options" else {}
    formula = Formula(hidden, method, clip_norm=row["clip_norm"], holds=holds(method), **options)
    expected, length = formula(weights(head=head), batches)
    info, grads = got(
        framework,
        method,
        batches,
        clip_norm=row["clip_norm"],
        features=staged(framework, 1, head) if row["stages"] == "staged" else partial(model, head=head),
        head=head,
        memory=Memory(row["cotangent"], chunk_bytes=400),  # several chunks
    )
    assert distance(grads, expected) < 1e-10
    assert float(info.perturbation_norm) == pytest.approx(length, rel=1e-9)
    assert float(info.weight) == pytest.approx(sum(float(formula.token_weights(b).sum()) for b in batches))
