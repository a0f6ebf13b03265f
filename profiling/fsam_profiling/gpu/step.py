"""Bytes that a whole PyTorch step with Triton kernels moves beside its model: `fsam profile gpu --what step`.

The operations that a step calls, and on how many rows, are recorded from a real step of the trainer, taken by the plain
backend on a small model (bfloat16 over float32 masters). The bytes of each operation at the preset's size are counted
in the kernels' compiled code, as by `--what head` and `--what parameters`. PyTorch's own passes are counted as
`gpu.passes` does: in the head at the preset's size; over weights and gradients in the small step, as bytes an element
of the vocabulary's matrix and of all other weights, times the preset's elements. Matrix products, attention and the
rest of the trunk are the same in every method's pass, and are not in these figures.

The rows of the file, one for each architecture, method and saving:

    arch, card, triton, shape, method, saving
    head                 (operation -> share of the step's rows that it is called on, summed over calls)
    parameters           (operation -> calls)
    head_bytes, parameter_bytes    of the kernels
    glue_bytes, weight_pass_bytes  of PyTorch's own passes: in the head, and over weights and gradients
    bytes                          of all four
    least_bytes, ratio, floor_us   of the kernels: any implementation's least, theirs over it, it over the bandwidth
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from fsam_core.errors import UserError
from fsam_kernels import torch as plain
from fsam_kernels.memory import AUTO
from fsam_kernels.shapes import ALL_HEADS, WEIGHTS, decoder
from fsam_kernels.torch import softmax_stats
from fsam_profiling.gpu import kernels, parameter_launches, parameters
from fsam_profiling.gpu.code import BY_NAME
from fsam_profiling.gpu.passes import HeadCall, PassCounter, head_glue
from fsam_profiling.rows import programs
from fsam_profiling.settings import random_tokens, step_settings
from fsam_trainers import registry

# An eighth of the rows is whole sequences, and no activation has as many elements as a weight.
SMALL = {"batch": 40, "seq_len": 16, "vocab_size": 256}
STAGES = ("statistics", "cotangent")
BYTES = ("head_bytes", "parameter_bytes", "glue_bytes", "weight_pass_bytes", "bytes")


class Calls(NamedTuple):
    """One step.

    Attributes:
        head: operation on logits -> calls times share of the rows.
        parameters: parameter operation -> calls.
        of_head: the calls of the head.
        vocabulary_pass_bytes, other_pass_bytes: of PyTorch's own passes, an element of the vocabulary's matrix and of
            all other weights.
    """

    head: dict[str, float]
    parameters: dict[str, int]
    of_head: list[HeadCall]
    vocabulary_pass_bytes: float
    other_pass_bytes: float


def calls(shape: str, method: str, changes: dict[str, Any]) -> Calls:
    """The operations that a step of the trainer calls, the cotangent kept or recomputed as at that shape.

    Raises:
        UserError: for a step with an operation that `parameter_launches` does not list.
    """
    N, _, V = ALL_HEADS[shape]
    kept = AUTO.keeps(round(N * changes.get("correction_fraction", 1)), V, torch.bfloat16.itemsize)
    changes = {"cotangent": "keep" if kept else "recompute", **changes}
    small: dict[str, Any] = {"framework": "torch", "backend": "torch", "dtype": "bfloat16", **SMALL}
    chosen = step_settings("tiny", method, changes=changes, **small)
    trained, tokens_BxL1 = registry.make(chosen), random_tokens(chosen)
    total = chosen.batch * chosen.model.seq_len
    rows: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    of_head: list[HeadCall] = []
    shapes = decoder(chosen.model.layers, chosen.model.width, chosen.model.vocab_size, chosen.model.seq_len)
    sizes = [math.prod(each) for each in shapes]
    passes = PassCounter(lambda x: x.numel() in sizes)
    watched = partial(_watched, passes)
    with ExitStack() as stack:
        for name in STAGES:
            count: Any = lambda u_CxV, *_, name=name, **__: rows.update({name: len(u_CxV)})
            stack.enter_context(watched(softmax_stats, name, count))
        for name in ("preconditioned_norm", "perturb"):
            count = lambda *args, name=name, **options: operations.update([_listed(name, args, options)])
            stack.enter_context(watched(plain, name, count))
        count = lambda *args, **options: operations.update([_listed("adamw", args, options)])
        stack.enter_context(watched(plain.AdamW, "update", count))
        count = lambda h_NxD, *_, gradient=False, keep=False, **__: of_head.append(
            HeadCall("linear_cross_entropy", len(h_NxD) / total, gradient, keep)
        )
        stack.enter_context(watched(plain, "linear_cross_entropy", count))
        count = lambda z, h_NxD, *_, **__: of_head.append(
            HeadCall("logit_vjp", len(h_NxD) / total, keep=z.kept_NxV is not None)
        )
        stack.enter_context(watched(plain, "logit_vjp", count))
        stack.enter_context(passes)
        trained.step(tokens_BxL1, 0)()
    V_D, *others = sizes
    of_vocabulary = passes.by_elements[V_D]
    return Calls(
        {name: n / total for name, n in rows.items()},
        dict(operations),
        of_head,
        of_vocabulary / V_D,
        (passes.total - of_vocabulary) / sum(others),
    )


def read(archs: list[str], shape: str, only: str) -> Iterator[dict[str, Any]]:
    """The rows of the file, in order.

    Raises:
        UserError: for a shape that is not both a head and a model, a row that is not known, and as `kernels.read`.
    """
    both = [name for name in ALL_HEADS if name in WEIGHTS]
    if shape not in both:
        raise UserError(f"shape: {shape!r} is not a whole model: use {', '.join(both)}")
    steps = [(name, saving, calls(shape, name, changes)) for name, saving, changes in programs(only)]
    N = ALL_HEADS[shape].N
    for arch in archs:
        stages = {row["stage"]: row for row in kernels.read([arch], shape) if row["options"] == "plain"}
        used = {name for *_, step in steps for name in step.parameters}
        listed = [one for one in parameter_launches.OPERATIONS if one.name in used]
        models = {row["operation"]: row for row in parameters.read([arch], [shape], listed)}
        for name, saving, step in steps:
            of_head = [(stages[x], share * N / stages[x]["rows"]) for x, share in step.head.items()]
            of_parameters = [(models[x], times) for x, times in step.parameters.items()]
            head, own = (sum(row["bytes"] * times for row, times in x) for x in (of_head, of_parameters))
            least = sum(row["least_bytes"] * times for row, times in (*of_head, *of_parameters))
            glue = head_glue(ALL_HEADS[shape], step.of_head).total
            in_vocabulary, *others = map(math.prod, WEIGHTS[shape])
            own_passes = step.vocabulary_pass_bytes * in_vocabulary + step.other_pass_bytes * sum(others)
            yield {
                "arch": arch,
                "card": BY_NAME[arch].name,
                "triton": next(iter(stages.values()))["triton"],
                "shape": shape,
                "method": name,
                "saving": saving,
                "head": step.head,
                "parameters": step.parameters,
                "head_bytes": round(head),
                "parameter_bytes": own,
                "glue_bytes": glue,
                "weight_pass_bytes": round(own_passes),
                "bytes": round(head + own + glue + own_passes),
                "least_bytes": round(least),
                "ratio": (head + own) / least,
                "floor_us": 1e6 * least / BY_NAME[arch].bandwidth,
            }


def table(found: list[dict[str, Any]]) -> Table:
    """One line a step of one architecture."""
    first = found[0]
    N, D, V = ALL_HEADS[first["shape"]]
    bandwidth = BY_NAME[first["arch"]].bandwidth / 1e12
    title = (
        f"{first['arch']} ({first['card']}, {bandwidth:g} TB/s), Triton {first['triton']}: "
        f"{first['shape']}, {N:,} tokens, D={D}, V={V}"
    )
    result = Table("step", title=title)
    for name in ("head MB", "parameters MB", "glue MB", "weight passes MB", "MB", "kernels x least", "floor us"):
        result.add_column(name, justify="right")
    for row in found:
        sizes = [f"{row[x] / 1e6:,.0f}" for x in BYTES]
        result.add_row(
            f"{row['method']} {row['saving']}".strip(), *sizes, f"{row['ratio']:.3f}", f"{row['floor_us']:,.0f}"
        )
    return result


def _watched(passes: PassCounter, owner: ModuleType | type, name: str, count: Callable[..., None]) -> Any:
    """`count` is called with the arguments of each call; what the plain backend does in it is not counted by passes."""
    own = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        count(*args, **options)
        with passes.paused():
            return own(*args, **options)

    return mock.patch.object(owner, name, staticmethod(counted) if isinstance(owner, type) else counted)


def _listed(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The name in `parameter_launches.OPERATIONS` of one call, by the tensors that it reads and writes."""
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    written = options.get("copy") if name == "adamw" else options.get("out") if name == "perturb" else None
    arrays = tuple(x[0].dtype for x in (*lists, *([written] if written else [])))
    prefix = f"{name}, of g too" if options.get("gradient") else name
    for one in parameter_launches.OPERATIONS:
        if one.name.startswith(prefix) and one.arrays == arrays:
            return one.name
    dtypes = ", ".join(str(x).removeprefix("torch.") for x in arrays)
    raise UserError(f"gpu: {prefix} of {dtypes} is not among the operations that are compiled without a card")
