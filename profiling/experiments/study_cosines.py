"""How much of the exact correction each saving keeps: cosines along a run, on the batches the run trains on.

    python profiling/experiments/study_cosines.py --study runs/study

The run is the exact method's, over the small part of the data, with the values that the study tuned. At some of its
steps every variant's gradient is taken on the same batch, at the same weights and moments; c = ĝ − g is its correction.
With c* the exact correction, the rows hold cos(c, c*), ‖c‖ / ‖c*‖ and ‖c*‖ / ‖g‖.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import fsam_core.jax as fsam
from fsam_core import UserError
from fsam_trainers.config import Settings
from fsam_trainers.data import Batches, prepare
from fsam_trainers.files import write_json
from fsam_trainers.jax import engine
from fsam_trainers.models import flax_decoder
from study import REGIMES, VARIANTS, Study, settings_of

# Ascent and scope of a variant matter here, not the steps that it corrects.
COMPARED = tuple(name for name, (method, changes) in VARIANTS.items() if method != "adamw" and "start" not in changes)

REGIME = "many passes"


@dataclass(frozen=True)
class CosinesOptions:
    """Compare every variant's correction with the exact one along a run."""

    study: Path = Path("runs/study")
    """folder of the study, which receives cosines.json"""
    every: int = 20
    """steps between comparisons"""


def measure(options: CosinesOptions) -> list[dict[str, Any]]:
    """One row for each variant and step of comparison."""
    try:
        done = json.loads((options.study / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--study: {options.study} holds no results.json; python profiling/experiments/study.py makes it"
        ) from None
    study, tuned = Study(**done["study"]), done["regimes"][REGIME]["tuned"]

    def of(name: str) -> Settings:
        rho = tuned["sam_rho" if name == "SAM" else "rho"]
        return settings_of(study, name, rho=rho, learning_rate=tuned["learning_rate"])

    settings = of("exact")
    gradients = {name: jax.jit(engine.gradient_of(of(name)), static_argnames="kind") for name in COMPARED}
    adamw = engine.optimizer(settings)
    params = flax_decoder.parameters(settings.model, settings.seed)
    state, previous = adamw.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(adamw.step)
    corpus = prepare(
        study.data,
        vocab_size=settings.model.vocab_size,
        seq_len=settings.model.seq_len,
        max_tokens=REGIMES[REGIME],
    )
    batches = Batches(corpus.train, settings.model.seq_len, settings.batch, settings.seed)
    rows = []
    for step in range(study.steps):
        batch = {"tokens": batches.at(step)}
        carry = fsam.Carry(previous=previous)
        (_, info), exact, _ = gradients["exact"](params, batch, state, fsam.Carry())
        if step % options.every == 0 or step == study.steps - 1:
            _, g, _ = gradients["exact"](params, batch, state, fsam.Carry(), kind="plain")
            for name, gradient in gradients.items():
                remembers = of(name).as_method().direction.remembers  # type: ignore[union-attr]
                found = gradient(params, batch, state, carry if remembers else fsam.Carry())[1]
                rows.append({"step": step, "variant": name, **_compared(found, exact, g)})
        params, state = update(params, exact, state, info)
        previous = exact
    return rows


@jax.jit
def _compared(found: Any, exact: Any, g: Any) -> dict[str, Any]:
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    correction, whole, plain = flat(found) - flat(g), flat(exact) - flat(g), flat(g)
    norm = jnp.linalg.norm
    return {
        "cosine": correction @ whole / (norm(correction) * norm(whole)),
        "length": norm(correction) / norm(whole),
        "exact_to_gradient": norm(whole) / norm(plain),
    }


def main() -> None:
    """The command."""
    options = tyro.cli(CosinesOptions, prog="python profiling/experiments/study_cosines.py")
    try:
        rows = [{k: float(v) if isinstance(v, jax.Array) else v for k, v in row.items()} for row in measure(options)]
        write_json(options.study / "cosines.json", {"every": options.every, "regime": REGIME, "rows": rows})
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
