"""Kernels that a PyTorch step launches on a GPU, counted without one: `fsam profile gpu --what launches`.

A step of the trainer's model, in bfloat16 over float32 masters, runs on tensors without storage ("meta"). There it
takes the code path of an accelerator, and anything that would wait for the device raises. A launch is

* an operation of PyTorch that is no view, no allocation and not on the host;
* each kernel of a list operation (`_foreach_*`, `_fused_adamw_`), cut as PyTorch's CUDA code cuts it;
* a kernel of the `triton` backend;
* a copy from the host.

Attention counts as one operation forwards and three backwards, as flash attention has it. Libraries may split a product
into more than one kernel, so a profiler of a real step can count more, the same in every row.

The rows of the file: preset, tokens, backend, method, saving; launches, and x_adamw of them; trunk (those in the model
and its autograd), beside (the others); by_operation (name -> launches beside the trunk).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_core import backends
from fsam_core import torch as fsam
from fsam_profiling.gpu import launches, parameter_launches
from fsam_profiling.gpu.passes import ALLOCATIONS
from fsam_profiling.rows import programs
from fsam_profiling.settings import step_settings
from fsam_trainers.models import torch_decoder

# ATen/native/cuda/MultiTensorApply.cuh: tensors a launch by how many lists it walks, blocks a launch, elements a block.
MOST_TENSORS, MOST_BLOCKS, BLOCK = (110, 64, 48, 36, 30), 320, 65536
ATTENTION_BACKWARD = 3
LISTS = {"_foreach_norm": 2}  # kernels a part, where that is not one: partial sums, and their sum
NOT_LAUNCHED = ALLOCATIONS | {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "is_pinned"}
EACH = {"masked_fill": 2}  # a copy, and the fill of it


class LaunchCounter(TorchDispatchMode):
    """Counts launches on devices other than the host while it is active.

    Attributes:
        launches: by name of the operation, beside the trunk.
        trunk: in the model and its autograd.
        calls: dispatched operations of any kind and place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_trunk = 0
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.trunk = self.calls = 0

    def add(self, name: str, count: int = 1) -> None:
        if self._in_trunk:
            self.trunk += count
        else:
            self.launches[name] += count

    @contextmanager
    def in_trunk(self) -> Iterator[None]:
        self._in_trunk += 1
        try:
            yield
        finally:
            self._in_trunk -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in _pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not func.is_view and name not in NOT_LAUNCHED and any(x.device.type != "cpu" and x.numel() for x in tensors):
            given = [*args, *(kwargs or {}).values()]
            if name.startswith("_foreach"):
                results = [out] if not func._schema.is_mutable and name != "_foreach_norm" else []
                self.add(name, LISTS.get(name, 1) * parts([x for x in (*given, *results) if _of_tensors(x)]))
            elif name.startswith("_fused"):  # the lists after the first four are of scalars
                self.add(name, parts([x for x in given if _of_tensors(x)][:4]))
            else:
                self.add(name, EACH.get(name, 1))
        return out


def parts(lists: Sequence[Sequence[Tensor]]) -> int:
    """Launches of one list operation: PyTorch's CUDA code cuts the lists by tensors and by blocks of elements.

    Lists whose tensors have not the same shapes are walked tensor by tensor.
    """
    if any(x.shape != y.shape for others in lists[1:] for x, y in zip(lists[0], others, strict=True)):
        return len(lists[0])
    most_tensors = MOST_TENSORS[min(len(lists), len(MOST_TENSORS)) - 1]
    found = tensors = blocks = 0
    for x in lists[0]:
        of_tensor = -(-x.numel() // BLOCK)
        tensors += bool(of_tensor)
        for block in range(1, of_tensor + 1):
            blocks += 1
            last = block == of_tensor
            if blocks == MOST_BLOCKS or (last and tensors == most_tensors):
                found, blocks, tensors = found + 1, 0, 0 if last else 1
    return found + bool(blocks)


def _of_tensors(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and isinstance(x[0], Tensor)


class _Attention(torch.autograd.Function):
    """Attention without its arithmetic: the shapes, and the number of launches."""

    @staticmethod
    def forward(ctx: Any, counter: LaunchCounter, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.counter = counter
        ctx.save_for_backward(q, k, v)
        counter.add("attention")
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.counter.add("attention", ATTENTION_BACKWARD)
        return (None, *(torch.empty_like(x) for x in ctx.saved_tensors))


def read(preset: str, tokens: int, only: str) -> Iterator[dict[str, Any]]:
    """The rows of the file, in order, of both backends.

    Raises:
        UserError: for an unknown preset or row.
    """
    for backend in ("torch", "triton"):
        of_adamw = 0
        for method, saving, changes in programs(only):
            counter = counted(preset, tokens, backend, method, changes)
            beside = counter.launches.total()
            total = beside + counter.trunk
            of_adamw = of_adamw or total  # AdamW is the first row
            yield {
                "preset": preset,
                "tokens": tokens,
                "backend": backend,
                "method": method,
                "saving": saving,
                "launches": total,
                "x_adamw": total / of_adamw,
                "trunk": counter.trunk,
                "beside": beside,
                "by_operation": dict(counter.launches.most_common()),
            }


def table(found: list[dict[str, Any]]) -> Table:
    """One line a row of the file."""
    title = f"Kernels launched by a step of {found[0]['preset']}, bfloat16 over masters, {found[0]['tokens']:,} tokens"
    result = Table("backend", "step", title=title)
    for name in ("launches", "x AdamW", "in the model", "beside it"):
        result.add_column(name, justify="right")
    result.add_column("most")
    for row in found:
        most = ", ".join(f"{name} {count}" for name, count in list(row["by_operation"].items())[:3])
        counts = [str(row["launches"]), f"{row['x_adamw']:.2f}", str(row["trunk"]), str(row["beside"])]
        result.add_row(row["backend"], f"{row['method']} {row['saving']}".strip(), *counts, most)
    return result


def counted(preset: str, tokens: int, backend: str, method: str, changes: dict[str, Any]) -> LaunchCounter:
    """The launches of one step; the first steps, which also send constant tables, are not counted."""
    step = made(preset, tokens, backend, method, changes)
    with counting() as counter:
        for _ in range(2):
            step()
        counter.reset()
        step()
    return counter


def made(preset: str, tokens: int, backend: str, method: str, changes: dict[str, Any]) -> Callable[[], Any]:
    """A step of that many tokens without storage, which can be called again and again."""
    chosen = step_settings(preset, method, changes=changes, framework="torch", backend="torch", dtype="bfloat16")
    with torch.device("meta"), mock.patch.object(torch_decoder, "load"):
        model = torch_decoder.Decoder(chosen.model, weights={})
    copies = fsam.masters(model)
    groups = [[p for p in copies if (p.ndim > 1) == matrices] for matrices in (True, False)]
    optimizer = backends.load("torch", backend).AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], copies=copies
    )
    with mock.patch.object(backends, "check_device"):
        step = fsam.Step(
            model, optimizer, chosen.as_method(), features=lambda *given: torch_decoder.features(*given), clip_norm=1.0,
            backend=backend, memory=fsam.Memory(chosen.cotangent),
        )  # fmt: skip
    L = chosen.model.seq_len
    tokens_BxL1 = torch.empty(tokens // L, L + 1, dtype=torch.int64, device="meta")

    def take() -> None:
        step(tokens_BxL1)
        step._unread = ()  # figures that will never arrive

    return take


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Count the launches of steps on tensors without storage inside the context."""
    counter = LaunchCounter()
    kernels = (
        {name: kernel.module for name, kernel in launches.KERNELS.items()}
        | parameter_launches.KERNELS
        | parameter_launches.UNREAD
    )

    def launched(name: str) -> dict[str, Any]:
        counter.add(name)
        return {"rows": 0, "columns": 0, "loss": None, "least_bytes": 0, "bulk": ()}

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **options: Any) -> Any:
            with counter.in_trunk():
                return own(*args, **options)

        return inside

    def sent(*args: Any, **options: Any) -> Any:
        counter.add("copy from the host")
        return own_sent(*args, **options)

    own_sent = parameter_launches.tables.sent
    attention = lambda q, k, v, **options: _Attention.apply(counter, q, k, v)
    with ExitStack() as stack:
        stack.enter_context(launches.recording(kernels, launched))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(parameter_launches.tables, "sent", sent))
        for owner, name in ((torch_decoder, "features"), (torch.autograd, "backward")):
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        stack.enter_context(counter)
        yield counter
