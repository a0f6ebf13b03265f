"""The cases of four gloo processes: what `make test` runs in one process group, and how results are read."""

from __future__ import annotations

import json
from pathlib import Path

import spawn

SCRIPT = Path(__file__).with_name("tensor_ranks_run.py")
CLOSE = 1e-5
METHODS = ("adamw", "adamw-clip", "sam", "precond-sam", "functional", "precond-functional", "logit")
OPTIONS = (
    "precond-functional-micro", "half-of-four", "quarter", "quarter-part", "quarter-sam", "quarter-logit", "part-sam",
    "hidden", "hidden-untied", "hidden-quarter", "every", "reuse", "start", "momentum", "previous", "memory", "looksam",
    "random", "micro", "own-ascent", "top", "dual", "per-tensor", "split", "split-functional", "split-known",
    "heads", "hidden-heads",
)  # fmt: skip
DATA = (
    "ddp:precond-functional-micro:3", "ddp-views:quarter:3", "ddp:hidden-untied:3", "ddp:part-sam:3",
    "fsdp:quarter-part:3", "hsdp:precond-sam:3", "ddp:hidden-heads:3", "fsdp:heads:3", "ddp:split:3",
    "fsdp:split-functional:3", "fsdp:memory:3",
)  # fmt: skip
TENSOR = (
    "tensor:precond-functional-micro:3", "tensor:random:3", "fsdp-tensor:adamw-clip:3",
    "fsdp-tensor-remat:hidden-quarter:3", "tensor:hidden-heads:3", "fsdp-tensor:split:3",
)  # fmt: skip
COUNTED = (
    *(f"{kind}:{name}:count" for kind in ("ddp", "fsdp") for name in ("adamw", "functional", "sam")),
    "ddp:precond-functional-micro:count", "ddp:quarter:count", "ddp-unused:quarter:count",
    *(f"ddp:{name}:count" for name in ("split", "split-functional", "split-known")),
    *(f"tensor:{name}:count" for name in ("adamw", "functional", "hidden-quarter", "sam")),
)  # fmt: skip
BEHAVIOUR = (
    "run:local", "run:raising-ddp", "run:raising-fsdp", "run:not-finite-ddp", "run:not-finite-fsdp", "run:evaluated",
    "run:refused", "run:remembered", "run:wide", "run:beside-masters", "run:options-tensor", "run:same-tensor",
    "run:raising-tensor", "run:not-finite-tensor", "run:checkpointed", "run:evaluated-tensor", "run:mixed",
    "run:refused-tensor",
)  # fmt: skip
SQUARE = ("run:options-fsdp-tensor", "run:same-fsdp-tensor", "run:raising-fsdp-tensor")


def of_kind(kind: str, kinds: tuple[str, ...]) -> list[str]:
    """What a way to wrap the model is tried with: the first of `kinds` with everything, each other with a third.

    Three that follow one another have everything between them.
    """
    i = kinds.index(kind)
    names = (*METHODS, *OPTIONS) if i == 0 else ("precond-functional", *OPTIONS[i % 3 :: 3], *METHODS[i % 3 :: 3])
    return [f"{kind}:{name}" for name in dict.fromkeys(names)]


def run(folder: Path, cases: list[str]) -> list[dict]:
    """What each rank found."""
    spawn.run(SCRIPT, folder / "results.json", *cases, env={"OMP_NUM_THREADS": "1"}, timeout=1800)
    return json.loads((folder / "results.json").read_text())


def every_rank(ranks: list[dict], case: str) -> dict:
    """The result of rank 0, where no rank failed."""
    for one in ranks:
        assert "error" not in one[case], one[case]["error"]
    return ranks[0][case]


def assert_close(ranks: list[dict], case: str) -> None:
    every_rank(ranks, case)
    worst = {name: max(one[case][name] for one in ranks) for name in ranks[0][case]}
    assert max(worst.values()) < CLOSE, f"{case}: {worst}"
