"""The ascent direction, shared by the norm and the perturbation, a piece of a tensor at a time; formulas in `spec`.

Piece by piece, because a tensor at a time would put every intermediate result through memory: a piece's stay in the
cache, and no temporary is longer than a piece. The square root's factor is taken out of it,

    d = k c g / (sqrt(v + r c² g²) + k δ),  r = (1 − β₂) / β₂,  k² = (1 − β₂ᵗ) / β₂      with the current moment
    d = k c g / (sqrt(v) + k δ),            k² = 1 − β₂ᵗ⁻¹                               with the previous one,
    d = k g / (sqrt(q v + g²) + k δ / c),   q = β₂ / ((1 − β₂) c²),  k² = (1 − β₂ᵗ) / (1 − β₂)

so that a piece takes a few operations, and k multiplies the sums or the scale. The third form is the first again, and a
step of Adagrad from the state q v: PyTorch's fused kernel for that makes one pass of sum, root, quotient and
subtraction on a CPU, and leaves the clipping to q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a piece. On a CPU its temporaries of 1 MiB stay in the caches: 2^15 elements took 2.3 times as long, for
# the calls, 2^16 1.4 times, 2^19 0.95 times (4 million weights, one thread). PyTorch gives a thread no less than 2^15
# elements of an operation, so beyond 8 threads a piece grows with them. On other devices it bounds the temporaries.
CPU_PIECE, PIECE = 2**18, 2**24
FIRST_STEP = torch.tensor(1.0, device="cpu")


class Adam(NamedTuple):
    """What the direction takes from AdamW: β₂, its eps, and the 1 − β₂ᵗ of the moment that is used."""

    b2: float
    eps: float
    correction: float | Tensor
    current: bool = True


class Entry(NamedTuple):
    """One parameter's tensors as 1-d arrays of which element i is always that of the same weight.

    Attributes:
        place: position in the lists that were given.
        arrays: as given, None where there is none.
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
    """One for each tensor that `mask` does not leave out; the last `written` lists are written to.

    Raises:
        ValueError: for lists of different lengths, tensors of different shapes, or a tensor to be written to that does
            not lie in memory as the others do.
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


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def flat(arrays: Sequence[Tensor | None], written: int = 0) -> list[Tensor | None]:
    """1-d views in the memory order of the last one; what lies otherwise is copied, which the written ones cannot be.

    Raises:
        ValueError: for different shapes, or where one of the last `written` would have to be copied.
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
    """Whether it fills one stretch of memory, in whatever order of its axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Scratch:
    """Buffers of one piece, made when first asked for."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (name, like.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < like.numel():
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._buffers[key][: like.numel()]


def pieces(arrays: Sequence[Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """The arrays a piece at a time; none of an empty tensor."""
    given = next(x for x in arrays if x is not None)
    n, size = given.numel(), PIECE
    if given.device.type == "cpu":
        size = CPU_PIECE * max(1, torch.get_num_threads() // 8)
    if n <= size:
        yield from (tuple(arrays),) if n else ()
        return
    for start in range(0, n, size):
        yield tuple(None if x is None else x[start : start + size] for x in arrays)


class Direction:
    """d / k of one piece after the other, in float32 (float64 for float64 gradients).

    Attributes:
        k: the factor that the pieces of d lack, a number or a scalar tensor.
        c: the factor that the pieces of c g lack.
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
        # 1 / c² has to leave room in float32 for what it multiplies; 0 and NaN do not.
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
            g = self._wide(g)
            d = self.scratch("direction", g, g.dtype).zero_()
            self._adagrad(d, g, v, 1.0)
            return d, g
        g, below = self._parts(g, v)
        return (g, g) if below is None else (torch.div(g, below, out=below), g)

    def into(self, d: Tensor, g: Tensor, v: Tensor | None) -> None:
        """d, with its factor, to an array of the dtype that it is computed in."""
        if self.q is not None:
            assert v is not None
            self._adagrad(d.zero_(), self._wide(g), v, float(self.k))
            return
        g, below = self._parts(g, v)
        torch.div(g, 1 if below is None else below, out=d).mul_(self.k)

    def added(self, theta: Tensor, g: Tensor, v: Tensor | None, step: Tensor, out: Tensor) -> None:
        """θ + step · d / k, written to `out`, which has the dtype of the direction and may be θ."""
        if self.q is not None and v is not None:
            self._adagrad(out.copy_(theta), self._wide(g), v, float(step))
            return
        g, below = self._parts(g, v)
        theta = theta if theta.dtype == out.dtype else self.scratch("weight", theta, out.dtype).copy_(theta)
        if step.device.type != "cpu":
            torch.addcmul(theta, g if below is None else torch.div(g, below, out=below), step, out=out)
        elif below is None:
            torch.add(theta, g, alpha=float(step), out=out)
        else:
            torch.addcdiv(theta, g, below, value=float(step), out=out)

    def _adagrad(self, x: Tensor, g: Tensor, v: Tensor, step: float) -> None:
        """x ← x + step · d / k.

        One thread, 4 million weights, in units of the time it takes to copy them: 4.3 for the norm and 3.5 for the
        perturbation, where addcmul, sqrt, add, div (or addcdiv) took 6.2 and 5.6; sqrt alone takes longer than this
        kernel. Fused AdamW with β₁ = 0 gives the same in 4.3 and 3.7 and carries a first moment along. torch.compile
        makes one loop of each, 1.2 and 2.0, for 23 s of compilation, 0.15 ms a call and a C++ compiler at hand.
        """
        root = self.scratch("root", g, g.dtype)
        if v.dtype == root.dtype:
            torch.mul(v, self.q, out=root)
        else:
            root.copy_(v).mul_(self.q)
        torch._fused_adagrad_(
            [x], [g], [root], [FIRST_STEP], lr=-step, lr_decay=0.0, weight_decay=0.0, eps=self.shift, maximize=False
        )

    def _wide(self, g: Tensor) -> Tensor:
        wide = torch.promote_types(g.dtype, torch.float32)
        return g if g.dtype == wide else self.scratch("gradient", g, wide).copy_(g)

    def _parts(self, g: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(g or c g, what it is divided by, None for the plain direction)."""
        g = self._wide(g)
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


def as_clip(clip: Tensor | float) -> Tensor | float:
    """A number where that can be had without waiting for a device."""
    return _number(clip)


def _number(x: Any) -> Any:
    return float(x) if not isinstance(x, Tensor) or x.device.type == "cpu" else x
