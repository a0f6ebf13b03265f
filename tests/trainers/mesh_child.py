"""A process with eight virtual devices: `python mesh_child.py REQUEST.json ANSWER.json`.

conftest.py gives the tests' own process four devices, and XLA reads their number once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from small_runs import save
from spawn import ONE_DEVICE

from fsam_trainers.config import PLACEMENT, Settings
from fsam_trainers.jax.engine import JaxEngine
from fsam_trainers.models.layout import ModelConfig

STEPS = 20
MODEL = {"layers": 2, "width": 16, "heads": 4, "seq_len": 8, "vocab_size": 64}


def settings(shape: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Settings:
    """A run small enough to be compiled in seconds, on a mesh of this shape."""
    model = ModelConfig(**(MODEL | changes.pop("model", {})))
    same: dict[str, Any] = {"method": "adamw", "steps": STEPS, "batch": 32, "rho": 0.2, "eps": 1e-6, "warmup": 2}
    return Settings("jax", model=model, **(same | changes), **dict(zip(PLACEMENT, shape, strict=True)))


def tokens(chosen: Settings, step: int) -> np.ndarray:
    """The batch of a step: this process's part of each micro-batch."""
    size = (chosen.micro_batches, jax.process_count(), -1, chosen.model.seq_len + 1)
    whole = np.random.default_rng(step).integers(0, chosen.model.vocab_size, chosen.batch * size[-1], dtype=np.int32)
    return whole.reshape(size)[:, jax.process_index()].reshape(-1, size[-1])


def train(engine: JaxEngine, first: int = 0, last: int = STEPS) -> list[list[float]]:
    """What each step reported: loss, the norms of g and ĝ, ‖ε‖."""
    reports = [engine.step(tokens(engine.settings, i), i)() for i in range(first, last)]
    assert not any(x.skipped for x in reports)
    return [[x.loss, x.base_norm, x.grad_norm, x.perturbation_norm] for x in reports]


def distances(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each mesh of case["shapes"], how far a run there ends from the same on one device.

    Reports are compared one by one, relative to their size; weights by ‖a − b‖ over how far they have come. For each of
    case["beside"], other changes, also how far a run with those on one device ends from it.
    """
    changes, steps = case["changes"], case.get("steps", STEPS)
    alone = JaxEngine(settings(**changes))
    start, expected = alone.weights(), train(alone, 0, steps)
    end = alone.weights()
    came = norm(end, start)
    found = {}
    runs = {"x".join(map(str, shape)): settings(tuple(shape), **changes) for shape in case["shapes"]}
    runs |= {f"beside {i}": settings(**(changes | more)) for i, more in enumerate(case.get("beside", ()))}
    for name, chosen in runs.items():
        engine = JaxEngine(chosen)
        reports = train(engine, 0, steps)
        off = np.nanmax(np.abs(np.subtract(reports, expected)) / (np.abs(expected) + 1e-30))
        figures = {"reports": float(off), "weights": norm(engine.weights(), end) / came, "came": came}
        found[name] = figures | {"largest_share": largest_share(engine)}
    return found


def moved(case: dict[str, Any]) -> dict[str, float]:
    """Relative distance of a run that is resumed halfway on another mesh from the uninterrupted one on the first."""
    changes, (first, second) = case["changes"], case["moved"]
    whole = JaxEngine(settings(tuple(first), **changes))
    train(whole, 0, STEPS // 2)
    folder = Path(case["folder"])
    save(whole, folder)
    rest = train(whole, STEPS // 2)
    other = JaxEngine(settings(tuple(second), **changes))
    other.restore(folder)
    reports = train(other, STEPS // 2)
    off = np.nanmax(np.abs(np.subtract(reports, rest)) / (np.abs(rest) + 1e-30))
    size = norm(whole.weights(), dict.fromkeys(whole.weights(), 0))
    share = {"largest_share": largest_share(other)}
    return {"reports": float(off), "weights": norm(other.weights(), whole.weights()) / size, **share}


def norm(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(a[name], np.float64) - b[name]).sum() for name in a)))


def largest_share(engine: JaxEngine) -> float:
    """Of all values of the state, the most that any device holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(engine.state):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.size
    return max(held.values()) / sum(x.size for x in jax.tree.leaves(engine.state))


def main() -> None:
    # Read when a device is first asked for.
    os.environ["XLA_FLAGS"] = f"{ONE_DEVICE} --xla_force_host_platform_device_count=8"
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = {name: moved(case) if "moved" in case else distances(case) for name, case in request.items()}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
