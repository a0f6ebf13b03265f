"""Options of the head, the same values in every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Layout = Literal["VD", "DV"]
Reduction = Literal["none", "sum", "mean"]
Form = Literal["auto", "keep", "recompute"]


@dataclass(frozen=True)
class Loss:
    """Which loss is taken of the logits u = h Wᵀ + b; the default is plain cross entropy.

    Attributes:
        label_smoothing: share s of the target that is spread evenly over the vocabulary, 0 ≤ s < 1.
        z_loss: factor ζ ≥ 0 of lse², which keeps the normaliser near 1 (1e-4 is usual).
        soft_cap: c > 0 for z = c tanh(u / c), which belongs to the network and not to the loss; None for z = u.

    Raises:
        ValueError: for a value outside these.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be a finite number >= 0, got {self.z_loss!r}")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must be > 0, or None for no cap; got {self.soft_cap!r}")

    def floor(self, vocabulary: int) -> float:
        """s / V: what label smoothing takes off every entry of a row's cotangent."""
        return self.label_smoothing / vocabulary


CROSS_ENTROPY = Loss()


def check_reduction(reduction: str, has_weights: bool, has_count: bool) -> None:
    """Whether a reduction is known, and has a use for what came with it.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be none, sum or mean; got {reduction!r}")
    if reduction == "none" and has_weights:
        raise ValueError("weights: reduction='none' returns each token's own loss; multiply it by them instead")
    if reduction != "mean" and has_count:
        raise ValueError(f"count: only reduction='mean' divides by it, got reduction={reduction!r}")


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


# Operations done in the time one byte of memory is moved, from published bfloat16 peaks: H100 989 T / 3.35 T = 295,
# TPU v6e 920 T / 1.64 T = 560. A 2-core CPU: about 100 G / 10 G.
_OPERATIONS_PER_BYTE = {"cpu": 10, "cuda": 295, "gpu": 295, "tpu": 560}


@dataclass(frozen=True)
class Memory:
    """What a step may spend on the head.

    Attributes:
        cotangent: how the logit cotangent waits for the second pass. "recompute" holds h and a few floats a row, and
            makes the logits again, one matrix product; "keep" holds P itself, N·V values in the dtype of h; "auto"
            keeps it when that fits in `keep_bytes` and `keeps` finds it faster.
        keep_bytes: what "auto" may hold, over all micro-batches of a step on a device.
        chunk_bytes: working memory of a chunk of rows; None for the platform's default.

    Raises:
        ValueError: for a value outside these.
    """

    cotangent: Form = "auto"
    keep_bytes: int = 2**30
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.cotangent not in get_args(Form):
            raise ValueError(f"cotangent must be auto, keep or recompute; got {self.cotangent!r}")
        for name in ("keep_bytes", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a number of bytes > 0, got {value!r}")

    def keeps(self, N: int, D: int, V: int, itemsize: int, platform: str) -> bool:
        """Whether N rows' P is kept.

        Keeping writes N·V values and reads them back, recomputing costs a matrix product of 2·N·D·V operations, so it
        is faster where 2 · itemsize · (operations a byte) < 2 · D.
        """
        if self.cotangent != "auto":
            return self.cotangent == "keep"
        faster = itemsize * _OPERATIONS_PER_BYTE.get(platform, 295) < D
        return faster and N * V * itemsize <= self.keep_bytes


AUTO = Memory()
