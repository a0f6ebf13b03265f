"""The error of the correction in bfloat16, ‖c_bf16 − c_fp32‖ / ‖c_fp32‖ on real batches, by where bfloat16 is used.

    python profiling/experiments/correction_rounding.py --json docs/data/correction-rounding.json

A short float32 run of AdamW provides weights and moments. Then c = ĝ − g of the preconditioned functional method is
computed on further batches: in float32, with the weights of both passes rounded and all else in float32, and wholly in
bfloat16. In each case the perturbation is added to float32 masters. The last row adds it to weights that are bfloat16
already, as an implementation without masters does.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import fsam_core.jax as fsam
from fsam_core import UserError
from fsam_trainers.config import Settings
from fsam_trainers.data import Batches, prepare
from fsam_trainers.files import write_json
from fsam_trainers.jax import engine
from fsam_trainers.models import flax_decoder
from fsam_trainers.presets import preset

BF16 = jnp.bfloat16


@dataclass(frozen=True)
class RoundingOptions:
    """Measure the error of the correction in bfloat16."""

    steps: int = 200
    """AdamW steps before the measurement"""
    batches: int = 5
    """batches on which the correction is computed"""
    batch: int = 8
    """sequences a step"""
    preset: str = "tiny"
    """model size"""
    rhos: tuple[float, ...] = (0.05, 0.2, 0.5)
    """lengths of the perturbation"""
    json: Path | None = None
    """also write the figures here"""


def rounded(tree: Any) -> Any:
    """Round to bfloat16, in float32; the derivative is 1."""
    return jax.tree.map(lambda x: x + jax.lax.stop_gradient(x.astype(BF16).astype(x.dtype) - x), tree)


def measure(options: RoundingOptions) -> list[dict[str, Any]]:
    """One row for each ρ and each place where bfloat16 is used."""
    size = preset(options.preset, "text")
    steps, sizes = options.steps + options.batches, size.model(tied=True, dropout=0.0)
    schedule: dict[str, Any] = {"learning_rate": size.learning_rate, "warmup": steps // 10}
    settings = Settings("jax", "adamw", sizes, steps, options.batch, **schedule)
    model = flax_decoder.Decoder(settings.model)
    corpus = prepare("python", vocab_size=sizes.vocab_size, seq_len=sizes.seq_len, max_tokens=300_000)
    batches = Batches(corpus.train, settings.model.seq_len, settings.batch, settings.seed)
    adamw = engine.optimizer(settings)
    features = partial(flax_decoder.features, model)
    places = {
        "float32": features,
        "rounded weights": lambda params, batch: features(rounded(params), batch),
        "bfloat16": partial(features, dtype=BF16),
    }
    params = flax_decoder.parameters(settings.model, settings.seed)
    state = adamw.init(params)
    plain = fsam.value_and_grad(features, fsam.Plain(), b2=settings.b2)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        (_, info), g = plain(params, batch, state)
        return adamw.step(params, g, state, info)

    for i in range(options.steps):
        params, state = step(params, state, {"tokens": batches.at(i)})

    rows = []
    for rho in options.rhos:
        method = dataclasses.replace(settings, method="precond-functional-sam", rho=rho).as_method()
        of = {name: jax.jit(_correction(f, method, settings)) for name, f in places.items()}
        # Weights that are bfloat16 already lose any perturbation below half an ulp.
        of["perturbed in place"] = jax.jit(_in_place(features, method, settings))
        found: dict[str, list[float]] = {name: [] for name in of}
        for i in range(options.batches):
            batch = {"tokens": batches.at(options.steps + i)}
            exact = of["float32"](params, batch, state)
            for name, correction in of.items():
                found[name].append(float(_off(correction(params, batch, state), exact)))
        rows += [
            {"rho": rho, "where": name, "off": float(np.median(x)), "each": x}
            for name, x in found.items()
            if name != "float32"
        ]
    return rows


def _correction(features: Any, method: Any, settings: Any) -> Any:
    grad = fsam.value_and_grad(features, method, b2=settings.b2, eps=settings.eps, clip_norm=settings.clip_norm)

    def of(params: Any, batch: Any, state: Any) -> Any:
        moved, base = grad(params, batch, state)[1], grad(params, batch, state, kind="plain")[1]
        return jax.tree.map(jnp.subtract, moved, base)

    return of


def _in_place(features: Any, method: Any, settings: Any) -> Any:
    """Both passes at bfloat16 weights, θ rounded first and θ + ε rounded again; computed in float32."""
    inner = _correction(lambda params, batch: features(rounded(params), batch), method, settings)
    at_rounded = lambda params: jax.tree.map(lambda x: x.astype(BF16).astype(x.dtype), params)
    return lambda params, batch, state: inner(at_rounded(params), batch, state)


@jax.jit
def _off(found: Any, exact: Any) -> jax.Array:
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    return jnp.linalg.norm(flat(found) - flat(exact)) / jnp.linalg.norm(flat(exact))


def main() -> None:
    """The command."""
    options = tyro.cli(RoundingOptions, prog="python profiling/experiments/correction_rounding.py")
    try:
        rows = measure(options)
        if options.json is not None:
            write_json(options.json, rows)
    except UserError as error:
        print(f"fsam: error: {error}", file=sys.stderr)
        sys.exit(2)
    table = Table("rho", "where", "off the float32 correction (median)", "least and most")
    for row in rows:
        ends = f"{min(row['each']):.3f}–{max(row['each']):.3f}"
        table.add_row(f"{row['rho']:g}", row["where"], f"{row['off']:.3f}", ends)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
