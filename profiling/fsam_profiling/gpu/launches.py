"""The launches of the head's Triton kernels at every shape, recorded instead of made.

A stage is one call of the backend, which launches one kernel or more. `launches` calls the stage on tensors without
storage and records each launch, so what is compiled and counted is what is launched: argument types, constants,
alignments, warps, grid. A stage that launches a kernel which KERNELS does not list fails; each entry of KERNELS states
the least bytes that the kernel has to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_kernels.memory import chunk_rows
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.shapes import ALL_HEADS, HEADS, Head
from fsam_kernels.torch.softmax_stats import RowStats
from fsam_kernels.triton import softmax_stats, tiles

# Options that each kernel is compiled with: all off, and all on.
LOSSES = {"plain": CROSS_ENTROPY, "all options": Loss(label_smoothing=0.1, z_loss=1e-4, soft_cap=30.0)}


class Stage(NamedTuple):
    """One call of the backend.

    Attributes:
        name: of the function in `softmax_stats`.
        call: (chunk's logits [C, V], labels [C], loss) -> what runs the stage once on them.
        least_bytes: (C, V, bytes of a logit, loss) -> what any implementation of the stage has to move.
    """

    name: str
    call: Callable[[Tensor, Tensor, Loss], Callable[[], object]]
    least_bytes: Callable[[int, int, int, Loss], int]


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
        module: where the stages find it.
        bulk: the arrays that must move 16 bytes at a time: those that grow with N·V, or the kernel's main input.
        least_bytes: (C, V, bytes of a logit, loss) -> each input read once, each output written once.
    """

    module: Any
    bulk: tuple[str, ...]
    least_bytes: Callable[[int, int, int, Loss], int]


@dataclass(frozen=True)
class Launch:
    """One launch as it was made, without its data.

    Attributes:
        kernel: name in KERNELS.
        fn: the jit function.
        signature: Triton's type of each argument that is not a constant.
        constants: the other arguments: constexpr ones, None, and integers that are 1.
        aligned: arguments that are known to be multiples of 16 (bytes for a pointer, the number itself for an integer).
        within_2_gib: pointers to arrays below 2 GiB, which lets AMD's compiler use 32-bit offsets.
        integers: values of the integer arguments.
        num_warps, options: as launched.
        grid: programs.
        rows, columns: of the chunk of logits.
        loss: its options.
        least_bytes: as of the kernel.
        bulk: as of the kernel.
        tables: integer arrays that programs read to find their data, by argument.
    """

    kernel: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    within_2_gib: tuple[str, ...]
    integers: dict[str, int]
    num_warps: int
    options: dict[str, Any]
    grid: int
    rows: int
    columns: int
    loss: Loss
    least_bytes: int
    bulk: tuple[str, ...]
    tables: dict[str, Any] = field(default_factory=dict)

    @property
    def specialisation(self) -> tuple[Any, ...]:
        """Equal for launches that run the same machine code."""
        parts = (self.signature, self.constants, self.options)
        return (self.kernel, self.num_warps, self.aligned, self.within_2_gib, *(tuple(x.items()) for x in parts))


def _figures(u_CxV: Tensor) -> RowStats:
    return RowStats(*u_CxV.new_zeros(len(RowStats._fields), len(u_CxV), dtype=torch.float32))


def _cotangent(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> Callable[[], object]:
    figures = _figures(u_CxV)
    return lambda: softmax_stats.cotangent(u_CxV, figures, labels_C, loss, u_CxV)


def _through_cap(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> Callable[[], object]:
    soft_cap = loss.soft_cap
    if soft_cap is None:
        return lambda: None
    p_CxV = softmax_stats.empty_chunk(len(u_CxV), u_CxV.shape[1], u_CxV)
    return lambda: softmax_stats.through_cap_(p_CxV, u_CxV, soft_cap)


STAGES = (
    Stage(
        "statistics",
        lambda u_CxV, labels_C, loss: lambda: softmax_stats.statistics(u_CxV, labels_C, loss),
        lambda C, V, b, loss: C * (V * b + 8 + 5 * 4),
    ),
    Stage("cotangent", _cotangent, lambda C, V, b, loss: C * (V * 2 * b + 8 + 3 * 4)),
    Stage("through_cap_", _through_cap, lambda C, V, b, loss: C * V * 3 * b),
)


def _tile_values(C: int, V: int, loss: Loss) -> int:
    return C * 4 * (1 + (3 if loss.label_smoothing else 2) * -(-V // softmax_stats.BLOCK))


KERNELS = {
    "tile_statistics": Kernel(tiles, ("u_ptr",), lambda C, V, b, loss: C * (V * b + 8) + _tile_values(C, V, loss)),
    "combine": Kernel(
        tiles, ("top_ptr", "others_ptr", "total_ptr"), lambda C, V, b, loss: _tile_values(C, V, loss) + C * (8 + 5 * 4)
    ),
    "cotangent": Kernel(tiles, ("u_ptr", "out_ptr"), lambda C, V, b, loss: C * (V * 2 * b + 8 + 3 * 4)),
    "through_cap": Kernel(tiles, ("p_ptr", "u_ptr"), lambda C, V, b, loss: C * V * 3 * b),
}


def heads(shape: str | None) -> dict[str, Head]:
    """The head of that name, or all.

    Raises:
        UserError: for a shape that is not known.
    """
    if shape is not None and shape not in ALL_HEADS:
        raise UserError(f"shape: {shape!r} is not known: use {', '.join(ALL_HEADS)}")
    return HEADS if shape is None else {shape: ALL_HEADS[shape]}


def chunk(head: Head, dtype: torch.dtype, device: str, loss: Loss = CROSS_ENTROPY) -> tuple[Tensor, Tensor]:
    """(logits [C, V] in padded rows, labels [C]) of one chunk, on "meta" without storage, elsewhere random.

    C is that of a step on a GPU.
    """
    C = chunk_rows(head.V, dtype.itemsize, 4, loss, None, "cuda", in_place=softmax_stats.IN_PLACE, N=head.N)
    u_CxV = softmax_stats.empty_chunk(C, head.V, torch.empty(0, dtype=dtype, device=device))
    labels_C = torch.zeros(C, dtype=torch.int64, device=device)
    if device != "meta":
        u_CxV.normal_()
        labels_C.random_(head.V)
    return u_CxV, labels_C


def launches(stage: Stage, head: Head, dtype: torch.dtype, loss: Loss = CROSS_ENTROPY) -> list[Launch]:
    """The launches of one call of `stage` on one chunk of `head`, in order."""
    u_CxV, labels_C = chunk(head, dtype, "meta", loss)
    call = stage.call(u_CxV, labels_C, loss)
    C, V = u_CxV.shape

    def described(name: str) -> dict[str, Any]:
        kernel = KERNELS[name]
        least = kernel.least_bytes(C, V, u_CxV.dtype.itemsize, loss)
        return {"rows": C, "columns": V, "loss": loss, "least_bytes": least, "bulk": kernel.bulk}

    with recording({name: kernel.module for name, kernel in KERNELS.items()}, described) as found:
        call()
    return found


@contextmanager
def recording(kernels: dict[str, Any], described: Callable[[str], dict[str, Any]]) -> Iterator[list[Launch]]:
    """Record the launches of the named kernels inside the context; the kernels do not run.

    Args:
        kernels: name -> the module that holds it.
        described: name -> the launch's `rows`, `columns`, `loss`, `least_bytes` and `bulk`.
    """
    found: list[Launch] = []
    own = {name: getattr(module, name) for name, module in kernels.items()}
    try:
        for name, module in kernels.items():
            setattr(module, name, _Recorder(name, own[name], found, described))
        yield found
    finally:
        for name, module in kernels.items():
            setattr(module, name, own[name])


class _Recorder:
    """Stands in for a jit function: `recorder[grid](*args, **kwargs)` records the launch."""

    def __init__(self, name: str, fn: Any, found: list[Launch], described: Callable[[str], dict[str, Any]]) -> None:
        self.name, self.fn, self.found, self.described = name, fn, found, described

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.found.append(_launch(self, grid, args, kwargs))


def _launch(kernel: _Recorder, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch as Triton's own launcher describes it: types, constants, specialisations."""
    names = kernel.fn.arg_names
    values = dict(zip(names, args, strict=False)) | {name: x for name, x in kwargs.items() if name in names}
    options = {name: x for name, x in kwargs.items() if name not in names}
    general = getattr(kernel.fn, "do_not_specialize", None) or getattr(kernel.fn, "kwargs", {}).get("do_not_specialize")
    general = general or ()  # an interpreted function keeps it among its keywords
    constexpr = {name for name in names if "constexpr" in str(kernel.fn.fn.__annotations__.get(name, ""))}
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    constants, signature, aligned = {}, {}, []
    for name, x in values.items():
        special = name not in general and names.index(name) not in general
        if name in constexpr or x is None or (special and isinstance(x, int) and x == 1):
            constants[name] = x
            continue
        signature[name] = _type(x)
        size = x.storage_offset() * x.dtype.itemsize if isinstance(x, Tensor) else x
        if special and not isinstance(x, float) and size % 16 == 0:
            aligned.append(name)
    described = kernel.described(kernel.name)
    described["bulk"] = tuple(name for name in described["bulk"] if name in tensors)
    return Launch(
        kernel=kernel.name,
        fn=kernel.fn,
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        within_2_gib=tuple(name for name, x in tensors.items() if _bytes(x) < 2**31),
        integers={name: x for name, x in values.items() if isinstance(x, int)},
        num_warps=options.pop("num_warps"),
        options=options,
        grid=grid[0],
        **described,
    )


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"*{_TYPES[x.dtype]}"
    if isinstance(x, float):
        return "fp32"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()
