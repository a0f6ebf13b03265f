"""Bytes that PyTorch's own kernels move, counted operation by operation: `fsam profile gpu --what passes`.

`PassCounter` sees every operation under it, also those of autograd, on tensors with or without storage. It counts what
an operation reads and writes, each tensor once; a fused library kernel may move less and a poor one more. Matrix
products, views and allocations move nothing here.

The rows of the file, two for each head, that of the first pass with its gradients and that of the second pass from a
kept cotangent:

    shape, rows (of a chunk), dtype, part ("first" or "second")
    bytes, operations    of PyTorch's own passes between the kernels and products
    by_operation         name -> bytes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_kernels import torch as plain
from fsam_kernels.shapes import Head
from fsam_kernels.torch.linear_cross_entropy import adds_in_float32
from fsam_kernels.triton import softmax_stats
from fsam_profiling.gpu import launches

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv"}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_", "resize_"}
# Their first argument is not read.
OVERWRITTEN = {"copy_", "fill_", "zero_", "normal_", "random_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
GATHERS = {"embedding", "gather", "index", "index_select"}  # they read what they return, and an index


class PassCounter(TorchDispatchMode):
    """Counts operations and their bytes while it is active.

    Attributes:
        bytes: by name of the operation.
        operations: likewise.
        by_elements: bytes by the number of elements of the tensor that was read or written.
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda x: True) -> None:
        """`counts`: whether a tensor is counted at all."""
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.by_elements: Counter[int] = Counter()
        self._counts, self._paused = counts, False

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if self._paused or func.is_view or name in PRODUCTS | ALLOCATIONS:
            return out
        if name == "copy_" and _same_elements(*args[:2]):  # `x[rows] += y` ends with one, which PyTorch skips
            return out
        moved = [x for x in _read_and_written(func, name, args, kwargs, out) if x.numel() and self._counts(x)]
        for x in moved:
            self.bytes[name] += _bytes(x)
            self.by_elements[x.numel()] += _bytes(x)
        self.operations[name] += bool(moved)
        return out


def _read_and_written(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    read: list[Tensor] = []
    written = _tensors(out)
    for argument in func._schema.arguments:
        tensors = _tensors(given.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written and not any(x is y for x in tensors for y in written):
            written += tensors
        if not (is_written and (argument.kwarg_only or name in OVERWRITTEN)):
            read += tensors
    return [*(_tensors(out) if name in GATHERS else read), *written]


class HeadCall(NamedTuple):
    """One call of the head's operations.

    Attributes:
        operation: "linear_cross_entropy" or "logit_vjp".
        share: of the head's rows.
        gradient: of `linear_cross_entropy`.
        keep: likewise; of `logit_vjp` whether its cotangent was kept.
    """

    operation: str
    share: float = 1.0
    gradient: bool = False
    keep: bool = False


PARTS = {
    "first": HeadCall("linear_cross_entropy", gradient=True),
    "second": HeadCall("logit_vjp", keep=True),
}


def head_glue(head: Head, calls: Iterable[HeadCall], dtype: torch.dtype = torch.bfloat16) -> PassCounter:
    """PyTorch's own passes of the `triton` head on a GPU, between its kernels and products."""
    counter = PassCounter()
    with launches.recording({name: kernel.module for name, kernel in launches.KERNELS.items()}, _undescribed):
        for call in calls:
            N = round(head.N * call.share)
            h_NxD, w_VxD = (torch.empty(rows, head.D, dtype=dtype, device="meta") for rows in (N, head.V))
            labels_N = torch.empty(N, dtype=torch.int64, device="meta")
            weights_N = torch.empty(N, device="meta")
            first = partial(
                plain.linear_cross_entropy, h_NxD, w_VxD, labels_N, weights_N, keep=call.keep, softmax=softmax_stats
            )
            adds_in_float32(dtype, h_NxD.device)  # tried once, and not a part of the step
            if call.operation == "linear_cross_entropy":
                with counter:
                    first(gradient=call.gradient)
            else:
                cotangent = first()[2]
                with counter:
                    plain.logit_vjp(cotangent, h_NxD, w_VxD, softmax=softmax_stats)
    return counter


def read(shape: str | None, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of the file, of one head or of all.

    Raises:
        UserError: for a shape that is not known.
    """
    for name, head in launches.heads(shape).items():
        rows = len(launches.chunk(head, getattr(torch, dtype), "meta")[0])
        for part, call in PARTS.items():
            counted = head_glue(head, [call], getattr(torch, dtype))
            yield {
                "shape": name,
                "rows": rows,
                "dtype": dtype,
                "part": part,
                "bytes": counted.total,
                "operations": counted.operations.total(),
                "by_operation": dict(counted.bytes.most_common()),
            }


def table(found: list[dict[str, Any]]) -> Table:
    """One line a row of the file."""
    result = Table("head", "pass", title=f"PyTorch's own passes in the head, {found[0]['dtype']}")
    for name in ("operations", "MB"):
        result.add_column(name, justify="right")
    result.add_column("largest, MB")
    for row in found:
        largest = [f"{name} {moved / 1e6:,.0f}" for name, moved in list(row["by_operation"].items())[:3]]
        sizes = [str(row["operations"]), f"{row['bytes'] / 1e6:,.0f}"]
        result.add_row(f"{row['shape']}, {row['rows']:,} rows a chunk", row["part"], *sizes, ", ".join(largest))
    return result


def _undescribed(kernel: str) -> dict[str, Any]:
    return {"rows": 0, "columns": 0, "loss": None, "least_bytes": 0, "bulk": ()}


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def _same_elements(x: Tensor, y: Tensor) -> bool:
    where = lambda z: (z.untyped_storage()._cdata, z.storage_offset(), z.shape, z.stride(), z.dtype)
    return where(x) == where(y)


def _bytes(x: Tensor) -> int:
    """Bytes of its elements, those of an expanded axis once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()
