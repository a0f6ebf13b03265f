"""The head's memory budget: how large a chunk of rows is, and whether a cotangent is kept or recomputed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fsam_kernels.options import CROSS_ENTROPY, Loss

Form = Literal["auto", "keep", "recompute"]
BLOCK = 8192  # columns of w̄ added per product, where the library cannot add a half-precision product to float32
GPU_ROWS, GPU_BYTES = 4096, 2 * 2**30  # of a chunk by default, whichever is less
ROW_UNIT = 128  # rows of a tile of the matrix units


def default_chunk_bytes(platform: str) -> int:
    """The bytes that the working tensors of one chunk of rows may fill in JAX on "gpu", "tpu", …, and on a CPU.

    Each chunk of C rows reads and writes w̄ once, 8·V·D bytes, and takes 6·C·D·V operations. An accelerator does 250 to
    300 operations for each byte of memory, so w̄ costs 4/3 · 300 / C of the products' time. That is 15 % at 2730 rows,
    which fill 512 MiB in bfloat16 at V = 32768. A CPU gains nothing from chunks larger than its caches.
    """
    return (32 if platform == "cpu" else 512) * 2**20


def row_bytes(vocabulary: int, itemsize: int, accum_itemsize: int, loss: Loss, *, in_place: bool = False) -> int:
    """The bytes that one row of a chunk needs at its peak in PyTorch.

    A row has logits in the dtype of h (`itemsize` bytes) and exponentials in the dtype of the sums (`accum_itemsize`
    bytes). The exponentials overwrite the logits where both dtypes are the same. With a soft-cap the logits stay; the
    cotangent, and the cap's derivative or the other head's logits, need memory of their own.

    A backend that works `in_place` (`SoftmaxOps.IN_PLACE`) overwrites the logits with the cotangent in any dtype, and
    with a soft-cap needs one array more.
    """
    capped = loss.soft_cap is not None
    if in_place:
        return vocabulary * itemsize * (2 if capped else 1)
    if capped:
        return vocabulary * 2 * (accum_itemsize + itemsize)
    return vocabulary * (accum_itemsize if itemsize == accum_itemsize else accum_itemsize + itemsize)


def chunk_rows(
    vocabulary: int,
    itemsize: int,
    accum_itemsize: int,
    loss: Loss,
    chunk_bytes: int | None,
    platform: str = "cpu",
    *,
    in_place: bool = False,
    N: int | None = None,
) -> int:
    """The rows of a chunk in PyTorch, at least one: working tensors of `chunk_bytes` at most, or the default's.

    On a CPU the default is `default_chunk_bytes`. Elsewhere it is GPU_ROWS rows, or fewer where those fill more than
    GPU_BYTES: at 4,096 rows w̄ costs 10 % of the products' time by the count of `default_chunk_bytes`. Chunks are there
    multiples of ROW_UNIT where so many rows fit, and those of N rows are as equal as that allows: a last chunk of two
    rows would read and write all of w̄ as well.
    """
    each = row_bytes(vocabulary, itemsize, accum_itemsize, loss, in_place=in_place)
    if platform == "cpu":
        return max(1, (default_chunk_bytes(platform) if chunk_bytes is None else chunk_bytes) // each)
    most = max(1, min(GPU_ROWS, GPU_BYTES // each) if chunk_bytes is None else chunk_bytes // each)
    unit = ROW_UNIT if most >= ROW_UNIT else 1
    most -= most % unit
    if not N:
        return most
    count = math.ceil(N / most)
    return min(N, unit * math.ceil(N / (count * unit)))


def head_bytes(
    framework: str,
    N: int,
    D: int,
    V: int,
    itemsize: int,
    *,
    loss: Loss = CROSS_ENTROPY,
    gradient: bool = True,
    keep: bool = False,
    chunk_bytes: int,
    accum_itemsize: int = 4,
) -> int:
    """The bytes that `linear_cross_entropy` allocates at its peak, results included; weights have the dtype of h.

    Five statistics a row, the kept P, h̄ and w̄ (summed in `accum_itemsize` bytes) are held throughout. A chunk adds its
    logits and what is computed from them. In "torch" a chunk also adds its weighted h and, where h is narrower than the
    sums, one block of the product that is added to w̄ (on a GPU the product adds it itself); the cast of w̄ comes after
    the last chunk. In "jax" w̄ is scaled and cast into a new array while the chunks' memory is still held.
    """
    always = 5 * N * accum_itemsize + keep * N * V * itemsize + gradient * (N * D * itemsize + V * D * accum_itemsize)
    if framework == "jax":
        return always + min(chunk_bytes, N * V * (accum_itemsize + itemsize)) + gradient * V * D * itemsize
    rows = min(N, chunk_rows(V, itemsize, accum_itemsize, loss, chunk_bytes))
    chunk, narrow = rows * row_bytes(V, itemsize, accum_itemsize, loss), gradient * (itemsize != accum_itemsize)
    chunk += gradient * rows * D * itemsize + narrow * min(V, BLOCK) * D * itemsize
    return always + max(chunk, narrow * V * D * itemsize)


@dataclass(frozen=True)
class Memory:
    """The memory that a step may use for the head.

    Attributes:
        cotangent: how the logit cotangent is stored for the second pass. "recompute" stores h and a few floats a row
            and recomputes the logits, one matrix product. "keep" stores P itself, N·V values in the dtype of h, and is
            faster. "auto" keeps P where it fits in `keep_bytes`.
        keep_bytes: the limit for "auto", over all micro-batches of a step on a device.
        chunk_bytes: working memory of a chunk of rows; None for the platform's default (`chunk_rows` in PyTorch,
            `default_chunk_bytes` in JAX).
        row_axes: JAX only: the axes of the current mesh that the tokens are sharded over. Budgets are then per device.

    Raises:
        ValueError: for a value outside these.
    """

    cotangent: Form = "auto"
    keep_bytes: int = 2**30
    chunk_bytes: int | None = None
    row_axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cotangent not in get_args(Form):
            raise ValueError(f"cotangent must be auto, keep or recompute; got {self.cotangent!r}")
        for name in ("keep_bytes", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a number of bytes > 0, got {value!r}")

    def keeps(self, N: int, V: int, itemsize: int) -> bool:
        """Whether P of N rows and V columns is kept, at `itemsize` bytes a value.

        Keeping was faster for every D that was tried. A small D makes the product cheap relative to the N·V values of
        P, which would favour recomputing if that kept P out of memory. But no backend fuses P into both of its
        products, so recomputing moves as many bytes, and the base pass writes a chunk's P in either case.
        """
        return self.cotangent == "keep" or (self.cotangent == "auto" and N * V * itemsize <= self.keep_bytes)


AUTO = Memory()
