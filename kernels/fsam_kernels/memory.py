"""What the head may spend: chunks by a byte budget, and whether a cotangent is kept or recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fsam_kernels.options import CROSS_ENTROPY, Loss

Form = Literal["auto", "keep", "recompute"]
BLOCK = 8192  # columns whose product is added to w̄ at a time, where h is narrower than w̄'s sums


def default_chunk_bytes(platform: str) -> int:
    """Bytes that the working tensors of one chunk of rows may fill on "cpu", "cuda", "gpu", "tpu", ….

    Each chunk reads and writes w̄ once, 8·V·D bytes, beside 6·C·D·V operations on its C rows. At the 250 to 300
    operations an accelerator does for each byte of memory that is 4/3 · 300 / C of the products' time: 15 % at the 2730
    rows that 512 MiB are in bfloat16 at V = 32768. A CPU gains nothing from more than its caches hold.
    """
    return (32 if platform == "cpu" else 512) * 2**20


def row_bytes(vocabulary: int, itemsize: int, wide: int, loss: Loss) -> int:
    """Bytes that one row of a chunk needs at its peak, in `torch`.

    Logits in the dtype of h (`itemsize` bytes) and exponentials in the dtype of sums (`wide`), which take the logits'
    place where the two are one. Under a soft-cap the logits stay, and the derivative, or the other head's logits, and
    the cotangent come beside them.
    """
    if loss.soft_cap is not None:
        return vocabulary * 2 * (wide + itemsize)
    return vocabulary * (wide if itemsize == wide else wide + itemsize)


def chunk_rows(vocabulary: int, itemsize: int, wide: int, loss: Loss, chunk_bytes: int) -> int:
    """Rows of a chunk whose working tensors fill at most `chunk_bytes`; one at the least."""
    return max(1, chunk_bytes // row_bytes(vocabulary, itemsize, wide, loss))


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
    wide: int = 4,
) -> int:
    """Bytes that `linear_cross_entropy` allocates at its peak, results included; weights in the dtype of h.

    All along: five figures a row, the kept P, h̄ and w̄, which is summed in `wide` bytes. A chunk has its logits and what
    is made of them. In "torch" it also has its weighted h and, where h is narrower than the sums, a block of the
    product that is added to w̄; at the end comes what w̄ is cast into. In "jax" w̄ is scaled and cast into a new array
    while the chunks' memory is still held.
    """
    always = 5 * N * wide + keep * N * V * itemsize + gradient * (N * D * itemsize + V * D * wide)
    if framework == "jax":
        return always + min(chunk_bytes, N * V * (wide + itemsize)) + gradient * V * D * itemsize
    rows = min(N, chunk_rows(V, itemsize, wide, loss, chunk_bytes))
    chunk, narrow = rows * row_bytes(V, itemsize, wide, loss), gradient * (itemsize != wide)
    chunk += gradient * rows * D * itemsize + narrow * min(V, BLOCK) * D * itemsize
    return always + max(chunk, narrow * V * D * itemsize)


@dataclass(frozen=True)
class Memory:
    """What a step may spend on the head.

    Attributes:
        cotangent: how the logit cotangent waits for the second pass. "recompute" holds h and a few floats a row, and
            makes the logits again, one matrix product; "keep" holds P itself, N·V values in the dtype of h, and is
            faster; "auto" keeps it where that fits in `keep_bytes`.
        keep_bytes: what "auto" may hold, over all micro-batches of a step on a device.
        chunk_bytes: working memory of a chunk of rows; None for the platform's default.
        row_axes: in JAX, the axes of the mesh in use that the tokens are sharded over. Budgets are then for a device.

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
        """Whether the P of N rows and V columns is kept, at `itemsize` bytes a value.

        Keeping is the faster whatever D is, wherever it was tried. A product that is cheap beside the N·V values of P
        would speak for recomputing if P were never in memory there; but no backend fuses P into both of its products,
        so recomputing writes and reads as many bytes, and in the base pass a chunk's P is written in either case.
        """
        return self.cotangent == "keep" or (self.cotangent == "auto" and N * V * itemsize <= self.keep_bytes)


AUTO = Memory()
