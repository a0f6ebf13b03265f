"""The ascent direction d, for the norm and the perturbation, one piece of a tensor at a time; formulas in `spec`.

The intermediate results of a piece stay in the cache, while those of a whole tensor would go through memory. No
temporary is longer than a piece. The factor k is taken out of the square root,

    d = k c g / (sqrt(v + r c² g²) + k δ),  r = (1 − β₂) / β₂,  k² = (1 − β₂ᵗ) / β₂      with the current moment
    d = k c g / (sqrt(v) + k δ),            k² = 1 − β₂ᵗ⁻¹                               with the previous one,
    d = k g / (sqrt(q v + g²) + k δ / c),   q = β₂ / ((1 − β₂) c²),  k² = (1 − β₂ᵗ) / (1 − β₂)

so that a piece takes a few operations, and k multiplies the sums or the scale. The third form equals the first. It is a
step of Adagrad from the state q v, for which PyTorch's fused CPU kernel does sum, root, quotient and subtraction in one
pass; clipping is part of q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a piece. On a CPU its temporaries of 1 MiB stay in the caches. Relative time of other sizes (4 million
# weights, one thread): 2^15 elements 2.3, because of the calls; 2^16 1.4; 2^19 0.95. PyTorch gives a thread at least
# 2^15 elements of an operation, so a piece grows with the threads beyond 8. On other devices it bounds the temporaries.
CPU_PIECE, PIECE = 2**18, 2**24
FIRST_STEP = torch.tensor(1.0, device="cpu")
# On a CPU tensors up to this many elements are given to PyTorch as lists: a call each costs more than their arithmetic.
SMALL = 2**16


class Adam(NamedTuple):
    """AdamW's values in the direction: β₂, eps, and the bias correction 1 − β₂ᵗ of the moment that is used."""

    b2: float
    eps: float
    correction: float | Tensor
    current: bool = True


class Entry(NamedTuple):
    """One parameter's tensors as 1-d arrays, in which element i always belongs to the same weight.

    Attributes:
        place: its position in the given lists.
        arrays: one of each list, None where a list is None.
        adam: None for the plain direction.
    """

    place: int
    arrays: tuple[Any, ...]
    adam: Adam | None


def entries(
    lists: Sequence[Sequence[Tensor] | None],
    adam: Sequence[Adam] | None = None,
    mask: Sequence[bool] | None = None,
    *,
    written: int = 0,
) -> Iterator[Entry]:
    """One entry for each tensor that is not masked; the caller writes to the last `written` lists.

    Raises:
        ValueError: for lists of different lengths, tensors of different shapes, or a written tensor whose memory layout
            differs from the others'.
    """
    columns = [x for x in lists if x is not None]
    count = len(columns[0])
    for name, given in (("adam", adam), ("mask", mask), *(("tensors", x) for x in columns)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: one for each of the {count} tensors is needed, got {len(given)}")
    for i in range(count):
        if mask is None or mask[i]:
            arrays = [None if x is None else local(x[i]) for x in lists]
            yield Entry(i, tuple(flat(arrays, written)), None if adam is None else adam[i])


@functools.cache
def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, or the dtype itself; looked up, because PyTorch dispatches the question."""
    return torch.promote_types(dtype, torch.float32)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def flat(arrays: Sequence[Tensor | None], written: int = 0) -> list[Tensor | None]:
    """1-d views in the memory order of the last array; an array with another layout is copied.

    Raises:
        ValueError: for different shapes, or where one of the last `written` arrays would have to be copied.
    """
    given = [x for x in arrays if x is not None]
    for other in given[1:]:
        if other.shape != given[0].shape:
            raise ValueError(f"tensors: one weight's have shapes {tuple(given[0].shape)} and {tuple(other.shape)}")
    if all(x.is_contiguous() for x in given):
        return [None if x is None else x.view(-1) for x in arrays]
    model = given[-1] if _dense(given[-1]) else torch.empty(given[-1].shape, device="meta")
    found: list[Tensor | None] = []
    for i, x in enumerate(arrays):
        if x is not None and x.stride() != model.stride():
            if i >= len(arrays) - written:
                raise ValueError("tensors: what is written to must lie in memory as the others do, or be contiguous")
            x = torch.empty_strided(model.shape, model.stride(), dtype=x.dtype, device=x.device).copy_(x)
        found.append(None if x is None else x.as_strided((x.numel(),), (1,)))
    return found


def _dense(x: Tensor) -> bool:
    """Whether the tensor fills one contiguous range of memory, in any order of its axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Scratch:
    """Buffers of the size of a piece, allocated on first use."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (name, like.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < like.numel():
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._buffers[key][: like.numel()]


def pieces(arrays: Sequence[Tensor | None]) -> list[tuple[Any, ...]]:
    """The arrays, one piece at a time; an empty tensor has no pieces."""
    given = next(x for x in arrays if x is not None)
    n, size = given.numel(), PIECE
    if given.device.type == "cpu":
        size = CPU_PIECE * max(1, torch.get_num_threads() // 8)
    if n <= size:
        return [tuple(arrays)] if n else []
    part = lambda x, start: None if x is None else x[start : start + size]
    return [tuple(part(x, start) for x in arrays) for start in range(0, n, size)]


class Direction:
    """d / k, piece by piece, in float32 (float64 for float64 gradients).

    Attributes:
        k: the factor of d that the pieces omit, a number or a scalar tensor.
        c: the factor of c g that the pieces omit.
    """

    def __init__(self, adam: Adam | None, clip: Tensor | float, scratch: Scratch, device: torch.device) -> None:
        self.scratch = scratch
        clip = clip.to(device) if isinstance(clip, Tensor) else clip
        self.clip: Tensor | float = 1.0
        self.k = self.c = clip
        self.q: Any = None
        self.shift: Any = 0.0
        if adam is None:
            return
        square = _number(adam.correction)
        # 1 / c² times v must not overflow float32; c = 0 and NaN would.
        in_range = not isinstance(clip, Tensor) and 1e-6 <= clip <= 1e6
        if device.type == "cpu" and adam.current and 0 < adam.b2 < 1 and in_range:
            self.q = adam.b2 / (1 - adam.b2) / clip**2
            self.k = math.sqrt(square / (1 - adam.b2))
            self.shift = self.k * adam.eps / clip
            return
        self.clip, self.c = clip, 1.0
        self.ratio = None if not adam.current else (1 - adam.b2) / adam.b2 if adam.b2 else math.inf
        square = square / (adam.b2 if adam.current and adam.b2 else 1.0)
        self.k = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
        self.shift = self.k * adam.eps

    def __call__(self, g: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """(d / k, g or c g); both may be overwritten by the next call."""
        if self.q is not None and v is not None:
            g = self._upcast(g)
            d = self.scratch("direction", g, g.dtype).zero_()
            self._adagrad(d, g, v, 1.0)
            return d, g
        g, below = self._parts(g, v)
        return (g, g) if below is None else (torch.div(g, below, out=below), g)

    @property
    def by_adagrad(self) -> bool:
        """Whether d is a step of Adagrad, which takes lists of tensors."""
        return self.q is not None

    def into_lists(self, d: Sequence[Tensor], g: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        """`into` of several float32 tensors in the form of Adagrad."""
        torch._foreach_zero_(list(d))
        self._fused_adagrad(list(d), list(g), list(torch._foreach_mul(list(v), self.q)), float(self.k))

    def into(self, d: Tensor, g: Tensor, v: Tensor | None) -> None:
        """Write d, k included, to an array of the dtype in which it is computed."""
        if self.q is not None:
            assert v is not None
            self._adagrad(d.zero_(), self._upcast(g), v, float(self.k))
            return
        g, below = self._parts(g, v)
        torch.div(g, 1 if below is None else below, out=d).mul_(self.k)

    def added(self, theta: Tensor, g: Tensor, v: Tensor | None, step: Tensor | float, out: Tensor) -> None:
        """Write θ + step · d / k to `out`, which has the dtype of the direction and may be θ."""
        if self.q is not None and v is not None:
            self._adagrad(out.copy_(theta), self._upcast(g), v, float(step))
            return
        g, below = self._parts(g, v)
        theta = theta if theta.dtype == out.dtype else self.scratch("weight", theta, out.dtype).copy_(theta)
        if isinstance(step, Tensor):
            torch.addcmul(theta, g if below is None else torch.div(g, below, out=below), step, out=out)
        elif below is None:
            torch.add(theta, g, alpha=float(step), out=out)
        else:
            torch.addcdiv(theta, g, below, value=float(step), out=out)

    def _adagrad(self, x: Tensor, g: Tensor, v: Tensor, step: float) -> None:
        """x ← x + step · d / k.

        Measured with one thread and 4 million weights, in units of the time of copying them: 4.3 for the norm and 3.5
        for the perturbation. With addcmul, sqrt, add, div (or addcdiv) it was 6.2 and 5.6; sqrt alone takes longer than
        this kernel. Fused AdamW with β₁ = 0 gives the same result in 4.3 and 3.7 and needs a first moment.
        torch.compile fuses each into one loop, 1.2 and 2.0, for 23 s of compilation, 0.15 ms a call and a C++ compiler.
        """
        root = self.scratch("root", g, g.dtype)
        if v.dtype == root.dtype:
            torch.mul(v, self.q, out=root)
        else:
            root.copy_(v).mul_(self.q)
        self._fused_adagrad([x], [g], [root], step)

    def _fused_adagrad(self, x: list[Tensor], g: list[Tensor], root: list[Tensor], step: float) -> None:
        steps = [FIRST_STEP] * len(x)
        options = {"lr_decay": 0.0, "weight_decay": 0.0, "eps": self.shift, "maximize": False}
        torch._fused_adagrad_(x, g, root, steps, lr=-step, **options)

    def _upcast(self, g: Tensor) -> Tensor:
        accum = accum_dtype(g.dtype)
        return g if g.dtype == accum else self.scratch("gradient", g, accum).copy_(g)

    def _parts(self, g: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(g or c g, its divisor or None for the plain direction)."""
        g = self._upcast(g)
        if isinstance(self.clip, Tensor) or self.clip != 1:
            clip = self.clip.to(g.device, g.dtype) if isinstance(self.clip, Tensor) else self.clip
            g = torch.mul(g, clip, out=self.scratch("gradient", g, g.dtype))
        if v is None:
            return g, None
        d = self.scratch("direction", g, g.dtype)
        v = v if v.dtype == g.dtype else d.copy_(v)
        if self.ratio is None:
            torch.sqrt(v, out=d)
        elif self.ratio == math.inf:
            torch.mul(g, g, out=d).sqrt_()
        else:
            torch.addcmul(v, g, g, value=self.ratio, out=d).sqrt_()
        return g, d.add_(self.shift)


class Part(NamedTuple):
    """A piece of one tensor's arrays, and the place of its first element."""

    at: int
    arrays: tuple[Any, ...]


def directions(
    lists: Sequence[Sequence[Tensor] | None],
    adam: Sequence[Adam] | None,
    clip: Tensor | float,
    mask: Sequence[bool] | None = None,
    *,
    written: int = 0,
) -> Iterator[tuple[Entry, Direction, list[Part]]]:
    """`entries`, each with its direction and its pieces; gradients are the first list.

    On a CPU a tensor that one operation is enough for is one piece: that operation leaves nothing in the cache for a
    later one.

    Raises:
        ValueError: as `entries`.
    """
    scratch, clip = Scratch(), as_clip(clip)
    for entry in entries(lists, adam, mask, written=written):
        g = entry.arrays[0]
        accum = accum_dtype(g.dtype)
        same = all(x is None or x.dtype == accum for x in entry.arrays)
        whole = entry.adam is None and g.device.type == "cpu" and same
        parts, at = [], 0
        for arrays in ([entry.arrays] if g.numel() else []) if whole else pieces(entry.arrays):
            parts.append(Part(at, arrays))
            at += arrays[0].numel()
        yield entry, Direction(entry.adam, clip, scratch, g.device), parts


def as_clip(clip: Tensor | float) -> Tensor | float:
    """`clip` as a number, unless that would wait for a device."""
    return _number(clip)


def _number(x: Any) -> Any:
    return float(x) if not isinstance(x, Tensor) or x.device.type == "cpu" else x
