"""What the regression guard measures: figures that need no accelerator, of every kernel, head program and step.

An item is one compilation, or several of one kind; it returns named figures. The quick ones take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fsam_profiling import rows
from fsam_profiling.settings import random_tokens, step_settings

Figures = dict[str, float]

CHIPS = ("v5e", "v6e")
SHAPES = ("tiny", "reference", "gpt2", "llama3-8b")
MODELS = ("118m", "gpt2")
FEW = ("preconditioned_norm", "perturb", "adamw")  # parameter operations that CI compiles
ROWS = 2048  # of a chunk of the head on a TPU
BATCH = 16  # sequences of a step
QUICK_FLOPS = (f"flops jax tiny {rows.METHOD}", f"flops jax tiny {rows.METHOD} 1/8 + cut hidden")
QUICK_HEAD = "tpu v5e head 2048x128x32768 pallas"
SMALL = {"N": 2048, "D": 128, "V": 32768}  # the smallest shape whose logits do not fit on the chip


@dataclass(frozen=True)
class Item:
    """Something to measure.

    Attributes:
        name: prefix of its figures' names.
        compilers: distributions whose versions the figures depend on.
        measure: () -> name -> figures.
        quick: whether CI measures it.
    """

    name: str
    compilers: tuple[str, ...]
    measure: Callable[[], dict[str, Figures]]
    quick: bool = False


@dataclass(frozen=True)
class TpuProgram:
    """A JAX program compiled for one core of a TPU; `function` and `options` as `compile_for` takes them."""

    name: str
    chip: str
    function: str
    options: dict[str, Any]
    donate: tuple[int, ...] = ()
    quick: bool = False

    def measure(self) -> dict[str, Figures]:
        from fsam_profiling.tpu.compiler import compile_for

        kernels: Any = True if self.options.get("backend") == "pallas" else "if any"
        one = compile_for(self.chip, self.function, options=self.options, donate=self.donate, kernels=kernels)
        return {
            self.name: {
                "cycles": one.cycles,
                "bytes": one.bytes,
                "temporary_bytes": one.temporary_bytes,
                "peak_bytes": one.peak_bytes,
                "product_flops": one.product_flops,
                "spills": sum(x.schedule.spills for x in one.kernels if not x.excluded),
            }
        }


def items() -> list[Item]:
    """All items, quick ones first."""
    found = [*_gpu(), *_flops(), *_tpu_parameters()]
    found += [Item(x.name, ("jax", "libtpu"), x.measure, x.quick) for x in programs()]
    return sorted(found, key=lambda item: not item.quick)


def programs() -> Iterator[TpuProgram]:
    """The programs compiled for TPUs: heads alone, and whole steps."""
    step = "fsam_profiling.tpu.step_programs:step"
    first, second = "fsam_profiling.tpu.head_programs:first_pass", "fsam_profiling.tpu.head_programs:second_pass"
    pallas = {"backend": "pallas", "rows": ROWS}
    yield TpuProgram(QUICK_HEAD, "v5e", first, SMALL | {"backend": "pallas", "rows": 512}, quick=True)
    large = {"N": 8192, "D": 1024, "V": 32768}
    for chip in CHIPS:
        for backend in ("xla", "pallas"):
            options = large | pallas | {"backend": backend}
            yield TpuProgram(f"tpu {chip} head reference {backend}", chip, first, options)
        yield TpuProgram(f"tpu {chip} second pass reference pallas", chip, second, large | pallas)
        name = f"tpu {chip} second pass recomputed reference pallas"
        yield TpuProgram(name, chip, second, large | pallas | {"keep": False})
    for method, saving, changes in rows.programs(""):
        if method in ("adamw", "sam", rows.METHOD):
            options = _step("tiny", method, changes, "xla")
            name = " ".join(filter(None, ("tpu v5e step tiny xla", method, saving)))
            yield TpuProgram(name, "v5e", step, options, donate=(0,))
    # The cheapest step where passes over weights count most, and where they count less.
    cheapest = "1/8 + cut hidden"
    for batch in (8, 32):
        options = _step("24m", rows.METHOD, dict(rows.SAVINGS)[cheapest], "pallas") | {"batch": batch}
        name = f"tpu v5e step 24m pallas {rows.METHOD} {cheapest}, {batch} sequences"
        yield TpuProgram(name, "v5e", step, options, donate=(0,))
    # The compiler takes four times as long for v6e, so there is only a small step.
    mine = rows.METHOD
    whole = (("tiny", "v5e", mine), ("tiny", "v6e", mine), ("24m", "v5e", "adamw"), ("24m", "v5e", mine))
    for preset, chip, method in whole:
        options = _step(preset, method, {}, "pallas")
        yield TpuProgram(f"tpu {chip} step {preset} pallas {method}", chip, step, options, donate=(0,))


def _step(preset: str, method: str, changes: dict[str, Any], backend: str) -> dict[str, Any]:
    same = {"preset": preset, "batch": BATCH, "dtype": "bfloat16"}
    return same | {"method": method, "changes": changes, "backend": backend}


def _tpu_parameters() -> Iterator[Item]:
    for chip in CHIPS:
        name = f"tpu {chip} parameters 118m"
        yield Item(name, ("jax", "libtpu"), partial(tpu_parameters, name, chip, "118m"))


def tpu_parameters(name: str, chip: str, model: str) -> dict[str, Figures]:
    """Every parameter operation over all tensors of a model."""
    from fsam_kernels.shapes import WEIGHTS
    from fsam_profiling.tpu.parameters import OPERATIONS, read

    found = {}
    for operation in OPERATIONS:
        row = read(chip, operation, WEIGHTS[model])
        figures = {x: row[x] for x in ("scheduled_cycles", "estimated_cycles", "temporary_bytes")}
        found[f"{name} {operation}"] = {"bytes_over_least": round(row["ratio"], 6), **figures}
    return found


# --- Triton kernels ---------------------------------------------------------------------------------------------------


def _gpu() -> Iterator[Item]:
    yield Item("gpu gfx942 head gpt2", ("triton",), partial(gpu_head, ("gfx942",), ("gpt2",)), quick=True)
    few = partial(gpu_parameters, ("sm_90",), ("gpt2",), FEW)
    yield Item("gpu sm_90 parameters gpt2, a few", ("triton",), few, quick=True)
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        shapes = tuple(x for x in SHAPES if (arch, x) != ("gfx942", "gpt2"))
        yield Item(f"gpu {arch} head", ("triton",), partial(gpu_head, (arch,), shapes))
        yield Item(f"gpu {arch} parameters", ("triton",), partial(gpu_parameters, (arch,), MODELS))


def gpu_head(archs: tuple[str, ...], shapes: tuple[str, ...]) -> dict[str, Figures]:
    """Every stage of the head's Triton kernels, each set of options, bfloat16 logits."""
    from fsam_profiling.gpu.kernels import read

    return {
        f"gpu {arch} head {shape} {row['stage']}, {row['options']}": _figures(row)
        for arch in archs
        for shape in shapes
        for row in read([arch], shape)
    }


def gpu_parameters(
    archs: tuple[str, ...], models: tuple[str, ...], operations: tuple[str, ...] = ()
) -> dict[str, Figures]:
    """The parameter operations' Triton kernels over all tensors of the models; all operations where none is named."""
    from fsam_profiling.gpu.parameter_launches import OPERATIONS
    from fsam_profiling.gpu.parameters import read

    chosen = [x for x in OPERATIONS if not operations or x.name in operations]
    return {
        f"gpu {row['arch']} parameters {row['model']} {row['operation']}": _figures(row)
        for row in read(archs, models, chosen)
    }


def _figures(row: dict[str, Any]) -> Figures:
    """The worst of each figure over the kernels of one operation."""
    kernels = row["kernels"]
    narrowest = lambda name: min((x[name] for x in kernels if x[name]), default=0)
    return {
        "bytes_over_least": round(row["ratio"], 6),
        "launches": len(kernels),
        "spills": sum(x["spills"] for x in kernels),
        "registers": max(x["registers"] for x in kernels),
        "load_bytes": narrowest("load_bytes"),
        "store_bytes": narrowest("store_bytes"),
    }


# --- matrix products --------------------------------------------------------------------------------------------------


def _flops() -> Iterator[Item]:
    for method, saving, changes in rows.programs(""):
        name = " ".join(filter(None, ("flops jax tiny", method, saving)))
        measure = partial(jax_flops, name, method, changes)
        yield Item(name, ("jax",), measure, quick=name in QUICK_FLOPS)
    for method in ("adamw", "sam", rows.METHOD):
        name = f"flops torch tiny {method}"
        yield Item(name, ("torch",), partial(torch_flops, name, method))


def jax_flops(name: str, method: str, changes: dict[str, Any]) -> dict[str, Figures]:
    """Matrix products of a step as it is traced."""
    from fsam_profiling import flops
    from fsam_profiling.tpu import step_programs

    chosen = step_settings("tiny", method, changes=changes, backend="xla")
    return {name: {"product_flops": flops.of_step(*step_programs.of(chosen))}}


def torch_flops(name: str, method: str) -> dict[str, Figures]:
    """Matrix products of a step as it runs."""
    from fsam_profiling.timing.torch_flops import count
    from fsam_trainers import registry

    chosen = step_settings("tiny", method, framework="torch", backend="torch")
    trained, tokens = registry.make(chosen), random_tokens(chosen)
    trained.prepare(tokens)
    return {name: {"product_flops": count(lambda: trained.step(tokens, 0)())}}
