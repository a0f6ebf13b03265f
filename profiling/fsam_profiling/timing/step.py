"""Step time of every method in both frameworks, interleaved in one process: `fsam profile step`, `make bench`.

Each row's ratio is to our AdamW step in the same framework; the last column compares the two frameworks. The peers of
`variants` follow our rows. A ratio is printed where it is distinguishable from 1: where its 20th and 80th percentile
are no further apart than it is from 1. Elsewhere the two percentiles stand alone.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import numpy as np
from rich.table import Table

from fsam_core import UserError
from fsam_profiling import results
from fsam_profiling.rows import frameworks_and_sizes, table_rows
from fsam_profiling.settings import step_settings
from fsam_profiling.timing import matmul_rate, trace, variants
from fsam_profiling.timing.peak import peak_bytes
from fsam_profiling.timing.variants import Variant
from fsam_trainers import device, timing
from fsam_trainers.console import Console
from fsam_trainers.tables import show, show_lines

WARM_UP = 1  # JAX steps are compiled ahead, and PyTorch has taken two steps to count its FLOPs
PARAMETERS = ("norm", "perturb", "update")
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class StepOptions:
    """Time one optimizer step of each method on random tokens, beside other implementations."""

    preset: str = "tiny"
    """model size, as in `fsam train`"""
    batch: int | None = None
    """sequences a step"""
    seq_len: int | None = None
    """tokens a sequence"""
    vocab_size: int | None = None
    """size of the vocabulary"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; bfloat16 over float32 masters"""
    repeats: int = 10
    """steps of each variant"""
    only: str = "common"
    """rows by method or saving ('sam,1/8,cut hidden'), common, or all; AdamW always; all models exist at once"""
    framework: Literal["both", "jax", "torch"] = "both"
    """jax, torch, or both beside each other"""
    peers: bool = True
    """also the textbook steps, optax.contrib.sam, and pytorch_optimizer's SAM where it is installed"""
    regions: bool = False
    """also the share of forward, backward and parameter work, from a trace of three steps"""
    peak: bool = False
    """also the peak memory of a step beside weights and moments, each variant in a process of its own"""
    json: Path | None = None
    """also write the figures here"""


def chosen_variants(options: StepOptions) -> dict[tuple[str, str, str], Variant]:
    """(framework, method, saving or peer) -> variant, in the order of the table.

    Raises:
        UserError: for an unknown preset or row, and for contradictory settings.
    """
    frameworks, sizes = frameworks_and_sizes(options)
    found: dict[tuple[str, str, str], Variant] = {}
    of = lambda framework, method, changes: step_settings(
        options.preset, method, framework=framework, changes=changes, **sizes
    )
    for method, saving, changes in table_rows(options.only):
        for framework in frameworks:
            found[framework, method, saving] = Variant(of(framework, method, changes))
    for framework in frameworks if options.peers else ():
        for (method, whose), peer in variants.peers(of(framework, "adamw", {})).items():
            found[framework, method, whose] = peer
    return found


def measure(options: StepOptions) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(one row a variant, the ceiling of each framework in operations a second); see `docs/profiling.md`.

    Raises:
        UserError: as `chosen_variants`, and for fewer than ten repeats.
    """
    if options.repeats < 10:
        raise UserError(f"--repeats must be at least 10 for a median worth printing, got {options.repeats}")
    asked = chosen_variants(options)
    frameworks: list[str] = list(dict.fromkeys(framework for framework, _, _ in asked))
    ceilings = {name: matmul_rate.flops_per_second(name, options.dtype) for name in frameworks}
    # A schedule has steps of several kinds. Each kind is timed by itself; a plain step is AdamW's.
    kinds = {name: _kinds(one) for name, one in asked.items()}
    timed = {(*name, kind): step for name, of in kinds.items() for kind, (_, step) in of.items()}
    runs = _made(timed)
    operations = {name: variants.flops(timed[name], run) for name, run in runs.items()}
    with Console().counting("timing", (options.repeats + WARM_UP) * len(runs)) as tick:
        wait = device.waiting(frameworks)
        times = timing.interleaved(runs, options.repeats, tick, warm_up=WARM_UP, wait=wait)
    del runs
    gc.collect()
    means = {name: _mean(name, of, times) for name, of in kinds.items()}
    changes = {(method, saving): changed for method, saving, changed in table_rows(options.only)}
    found = []
    for name, milliseconds in means.items():
        framework, method, saving = name
        one = asked[name]
        work = float(_mean(name, kinds[name], {key: [float(n)] for key, n in operations.items()})[0])
        row: dict[str, Any] = {"framework": framework, "method": method, "saving": saving, "peer": bool(one.peer)}
        row["options"] = None if one.peer else changes.get((method, saving), {})
        row |= {"params": one.settings.model.parameters, "tokens": one.settings.tokens_per_step}
        row |= figures(milliseconds, means[framework, "adamw", ""], work, ceilings[framework])
        row["tokens_per_s"] = 1e3 * row["tokens"] / row["step_ms"]
        other = means.get(("torch", method, saving))
        beside = ratio_figures(milliseconds, milliseconds if other is None else other)
        row |= {f"to_torch{x.removeprefix('ratio')}": None if other is None else y for x, y in beside.items()}
        row["peak_bytes"] = peak_bytes(one) if options.peak else None
        row["regions"] = _regions(one) if options.regions and not one.peer else None
        found.append(row)
    return found, ceilings


def _made(timed: Mapping[Name, Variant]) -> dict[Name, Callable[[int], Any]]:
    """A function to call repeatedly for each variant. XLA compiles several at once: 0.7 of the time on two cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {name: pool.submit(variants.make, one) for name, one in timed.items() if one.framework == "jax"}
        return {
            name: compiled[name].result() if name in compiled else variants.make(one) for name, one in timed.items()
        }


def figures(milliseconds: np.ndarray, base: np.ndarray, work: float, ceiling: float) -> dict[str, Any]:
    """Median and percentiles of a step and of its ratio to the interleaved base steps, and its use of FLOPs.

    Args:
        work: operations of a step's matrix products.
        ceiling: operations a second of a bare product.
    """
    low, middle, high = (float(x) for x in np.percentile(milliseconds, (20, 50, 80)))
    rate = 1e3 * work / middle
    times = {"step_ms": middle, "step_ms_p20": low, "step_ms_p80": high, **ratio_figures(milliseconds, base)}
    return times | {"flops": work, "flops_per_s": rate, "utilisation": rate / ceiling}


def ratio_figures(milliseconds: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Median ratio of neighbouring steps, its percentiles, and whether it is distinguishable from 1."""
    low, middle, high = (float(x) for x in np.percentile(milliseconds / base, (20, 50, 80)))
    return {"ratio": middle, "ratio_p20": low, "ratio_p80": high, "ratio_resolved": high - low <= abs(middle - 1)}


def _kinds(one: Variant) -> dict[str, tuple[float, Variant]]:
    """Kind of step -> (its share of the run, a variant with only such steps), as `timing.kinds_of`."""
    if one.peer or one.settings.method == "adamw":
        return {"": (1.0, one)}
    kinds: Any = timing.kinds_of(one.settings).items()
    return {kind: (share, Variant(of, kind=kind)) for kind, (share, of) in kinds}


def _mean(name: tuple[str, str, str], kinds: dict[str, tuple[float, Variant]], of: Mapping[Any, Any]) -> np.ndarray:
    """A figure of the average step of a run: each kind weighted by its share, plain steps as AdamW's."""
    plain = np.array(of[name[0], "adamw", "", ""])
    shares = {kind: share for kind, (share, _) in kinds.items()}
    return sum(
        (share * np.array(of[*name, kind]) for kind, share in shares.items()), (1 - sum(shares.values())) * plain
    )


def _regions(one: Variant) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        return trace.traced(one.settings, 3, Path(folder) / "trace.json.gz")["regions"]


def run(options: StepOptions) -> int:
    """Measure, print the table, write the file; 0."""
    found, ceilings = measure(options)
    if options.json is not None:
        about = {"preset": options.preset, "dtype": options.dtype, "repeats": options.repeats, "ceilings": ceilings}
        results.write(options.json, "step", found, about)
    show(table(found, options), *([inside(found)] if options.peak or options.regions else []))
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in ceilings.items())
    show_lines(
        f"ceiling: a {options.dtype} matrix product by itself, {rates}. FLOP use counts the products that a step runs, "
        "recomputed ones too. Percentiles (20–80 %) stand alone where a ratio is not distinguishable from 1."
    )
    return 0


def table(found: list[dict[str, Any]], options: StepOptions) -> Table:
    """One line a row."""
    first = found[0]
    result = Table(
        title=f"{options.preset}: {first['params']:,} parameters, {first['tokens']:,} tokens a step, "
        f"{options.repeats} steps"
    )
    for name in ("method", "saving or peer", "framework"):
        result.add_column(name, no_wrap=True)
    names = ["ms/step", "tokens/s", "x AdamW (20–80 %)", "FLOP use"]
    names += ["x PyTorch (20–80 %)"] * (options.framework == "both")
    for name in names:
        result.add_column(name, justify="right")
    for row in found:
        cells = [
            row["method"],
            row["saving"],
            row["framework"],
            f"{row['step_ms']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        is_base = row["method"] == "adamw" and not row["saving"]
        cells += ["1" if is_base else ratio_text(row, "ratio"), f"{row['utilisation']:.0%}"]
        if options.framework == "both":
            alone = row["framework"] == "torch" or row["to_torch"] is None
            cells.append("" if alone else ratio_text(row, "to_torch"))
        result.add_row(*cells)
    return result


def inside(found: list[dict[str, Any]]) -> Table:
    """Memory of a step, and where its time goes, as requested."""
    result = Table(title="peak memory beside weights and moments; shares of a step's work")
    for name in ("method", "saving or peer", "framework"):
        result.add_column(name, no_wrap=True)
    for name in ("peak MiB", "forward", "backward", "parameters"):
        result.add_column(name, justify="right")
    for row in found:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        result.add_row(row["method"], row["saving"], row["framework"], peak, *shares(row["regions"]))
    return result


def ratio_text(row: dict[str, Any], name: str) -> str:
    """A ratio with its percentiles, or these alone where it is not distinguishable from 1."""
    spread = f"({row[f'{name}_p20']:.2f}–{row[f'{name}_p80']:.2f})"
    return f"{row[name]:.2f} {spread}" if row[f"{name}_resolved"] else spread


def shares(regions: dict[str, float] | None) -> list[str]:
    """Shares of forward, backward and parameter work in the time of all regions."""
    if regions is None:
        return ["", "", ""]
    of = lambda *words: sum(ms for name, ms in regions.items() if any(word in name for word in words))
    groups = (of("forward"), of("backward"), of(*PARAMETERS))
    return [f"{x / sum(groups):.0%}" for x in groups]
