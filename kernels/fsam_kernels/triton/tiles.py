"""The kernels of `softmax_stats`: one program for one tile of BLOCK columns of one row, without a loop.

Without loops, a launch moves the bytes of one program times the grid, which `fsam profile gpu` counts in the generated
code. A full tile has no masks, so its loads and stores are 16 bytes wide; a row's last tile is RAGGED. `readable` is V,
or V rounded up to the end of the row's padding, which makes the loads of that tile 16 bytes wide too. Arithmetic is
float32 for every dtype of the logits. An option that is off is passed as None and compiles to no code.

Every launch turns off the fusing of products and sums (`enable_fp_fusion`), so that `cotangent` computes exactly the z
whose maximum `tile_statistics` took; `tl.fma` is written where a fused product-sum is wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

# tanh x = x + x³ (A0 + A1 x² + …) below SMALL, where 1 − 2t / (1 + t) would cancel. The fit is good to 1e-9, and in
# float32 to 1.2 half-units in the last place.
SMALL: tl.constexpr = tl.constexpr(0.55)
A0: tl.constexpr = tl.constexpr(-0.33333316)
A1: tl.constexpr = tl.constexpr(0.13332586)
A2: tl.constexpr = tl.constexpr(-0.05385231)
A3: tl.constexpr = tl.constexpr(0.021071678)
A4: tl.constexpr = tl.constexpr(-0.0062742373)


@triton.jit
def tile_statistics(
    u_ptr, labels_ptr, top_ptr, others_ptr, total_ptr, target_ptr,
    V, readable, T, u_stride, t_stride, soft_cap, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest z of one tile, Σ exp(z − largest) over the columns other than the target, and Σ z if `total_ptr`.

    The program whose tile holds the target writes its z; `total_ptr` is None without label smoothing.
    """
    row, tile = tl.program_id(0) // T, tl.program_id(0) % T
    u_ptr += row.to(tl.int64) * u_stride
    y = tl.maximum(tl.load(labels_ptr + row), -1)  # also a negative label that 32 bits would truncate to a column
    at = tile.to(tl.int64) * t_stride + row
    if (tile + 1) * BLOCK <= V:
        _statistics(u_ptr, y, top_ptr, others_ptr, total_ptr, at, tile, V, readable, soft_cap, BLOCK, RAGGED=False)
    else:
        _statistics(u_ptr, y, top_ptr, others_ptr, total_ptr, at, tile, V, readable, soft_cap, BLOCK, RAGGED=True)
    if (y >= tile * BLOCK) & (y < tl.minimum(V, (tile + 1) * BLOCK)):
        tl.store(target_ptr + row, _capped(tl.load(u_ptr + y).to(tl.float32), soft_cap))


@triton.jit
def _statistics(
    u_ptr, y, top_ptr, others_ptr, total_ptr, at, tile, V, readable, soft_cap,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    z = _capped(_load(u_ptr, columns, readable, RAGGED), soft_cap)
    if RAGGED:
        z = tl.where(columns < V, z, float("-inf"))
    top = tl.max(z, 0)
    # A tile whose logits are all −inf (a masked part of the vocabulary) must not give −inf − (−inf).
    e = tl.exp(z - tl.where(top == float("-inf"), 0.0, top))
    tl.store(top_ptr + at, top)
    tl.store(others_ptr + at, tl.sum(tl.where(columns == y.to(tl.int32), 0.0, e), 0))
    if total_ptr is not None:
        tl.store(total_ptr + at, tl.sum(tl.where(columns < V, z, 0.0) if RAGGED else z, 0))


# The last chunk has fewer rows, and C alone must not recompile the kernel.
@triton.jit(do_not_specialize=["C"])
def combine(
    top_ptr, others_ptr, total_ptr, target_ptr, labels_ptr,
    loss_C_ptr, lse_C_ptr, top_C_ptr, scale_C_ptr, target_C_ptr,
    C, V, T, t_stride, label_smoothing, z_loss, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The statistics of ROWS rows from those of their tiles; TILES is T rounded up to a power of two.

    Every array except the labels has t_stride rows, a multiple of 16 ≥ C; rows beyond C are undefined.
    """
    rows, tiles = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILES)
    room = rows < t_stride
    at = tiles[:, None].to(tl.int64) * t_stride + rows[None, :]
    held = (tiles < T)[:, None] & room[None, :]
    top_TxR = tl.load(top_ptr + at, mask=held, other=float("-inf"))
    top = tl.max(top_TxR, 0)
    others = tl.sum(tl.load(others_ptr + at, mask=held, other=0.0) * tl.exp(top_TxR - top[None, :]), 0)
    y = tl.load(labels_ptr + rows, mask=rows < C, other=-1)
    # A label outside the vocabulary has no logit: its z is NaN, and so are the loss and the row of the cotangent.
    z_y = tl.where(y < V, tl.load(target_ptr + rows, mask=room, other=0.0), float("nan"))
    gap = tl.where(y < 0, 0.0, z_y - top)
    e_y = tl.where(y < 0, 0.0, tl.exp(gap))
    total = others + e_y
    # On a confident row gap is 0 and total rounds to 1; the sum of the others keeps the digits. Elsewhere others
    # includes the largest column and is at least 1, so e_y − 1 need not be an expm1.
    log_total = _log1p(others + (e_y - 1.0))
    lse = top + log_total
    loss, scale, target = log_total - gap, 1.0 / total, -(others / total)
    if label_smoothing is not None:
        mean = tl.sum(tl.load(total_ptr + at, mask=held, other=0.0), 0) / V
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_total - (mean - top))
    if z_loss is not None:
        r = 2.0 * z_loss * lse
        loss, scale, target = loss + z_loss * lse * lse, (1.0 + r) * scale, (1.0 + r) * target + r
    if label_smoothing is not None:
        target += label_smoothing - label_smoothing / V
    tl.store(loss_C_ptr + rows, tl.where(y < 0, 0.0, loss), mask=room)
    tl.store(lse_C_ptr + rows, lse, mask=room)
    tl.store(top_C_ptr + rows, top, mask=room)
    tl.store(scale_C_ptr + rows, tl.where(y < 0, 0.0, scale), mask=room)
    tl.store(target_C_ptr + rows, tl.where(y < 0, 0.0, target), mask=room)


@triton.jit
def cotangent(
    u_ptr, top_C_ptr, scale_C_ptr, target_C_ptr, labels_ptr, out_ptr,
    V, readable, T, u_stride, out_stride, label_smoothing, soft_cap, BLOCK: tl.constexpr,
):  # fmt: skip
    """P of one tile: scale exp(z − top) − s/V, `target` in the target's column, 0 on an ignored row."""
    row, tile = tl.program_id(0) // T, tl.program_id(0) % T
    u_ptr += row.to(tl.int64) * u_stride
    out_ptr += row.to(tl.int64) * out_stride
    top, scale = tl.load(top_C_ptr + row), tl.load(scale_C_ptr + row)
    target, y = tl.load(target_C_ptr + row), tl.load(labels_ptr + row)
    if (tile + 1) * BLOCK <= V:
        p = _cotangent(u_ptr, top, scale, target, y, tile, V, readable, label_smoothing, soft_cap, BLOCK, RAGGED=False)
        _store(out_ptr, p, tile, V, BLOCK, RAGGED=False)
    else:
        p = _cotangent(u_ptr, top, scale, target, y, tile, V, readable, label_smoothing, soft_cap, BLOCK, RAGGED=True)
        _store(out_ptr, p, tile, V, BLOCK, RAGGED=True)


@triton.jit
def _cotangent(
    u_ptr, top, scale, target, y, tile, V, readable, label_smoothing, soft_cap,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    p = scale * tl.exp(_capped(_load(u_ptr, columns, readable, RAGGED), soft_cap) - top)
    if label_smoothing is not None:
        p -= label_smoothing / V
    return tl.where(columns == y.to(tl.int32), target, tl.where(y < 0, 0.0, p))


@triton.jit
def through_cap(p_ptr, u_ptr, V, p_readable, readable, T, p_stride, u_stride, soft_cap, BLOCK: tl.constexpr):
    """p (1 − tanh²(u / c)) of one tile, in place."""
    row, tile = tl.program_id(0) // T, tl.program_id(0) % T
    p_ptr += row.to(tl.int64) * p_stride
    u_ptr += row.to(tl.int64) * u_stride
    if (tile + 1) * BLOCK <= V:
        p = _through_cap(p_ptr, u_ptr, tile, p_readable, readable, soft_cap, BLOCK, RAGGED=False)
        _store(p_ptr, p, tile, V, BLOCK, RAGGED=False)
    else:
        p = _through_cap(p_ptr, u_ptr, tile, p_readable, readable, soft_cap, BLOCK, RAGGED=True)
        _store(p_ptr, p, tile, V, BLOCK, RAGGED=True)


@triton.jit
def _through_cap(p_ptr, u_ptr, tile, p_readable, readable, soft_cap, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    # 1 − tanh² = 4t / (1 + t)² keeps its digits where tanh is close to 1.
    t = tl.exp(-2.0 * tl.abs(_load(u_ptr, columns, readable, RAGGED) * (1.0 / soft_cap)))
    return _load(p_ptr, columns, p_readable, RAGGED) * (4.0 * t / ((1.0 + t) * (1.0 + t)))


@triton.jit
def _capped(u, soft_cap):
    """c tanh(u / c), or u itself without a cap. Triton's own tanh needs a different library for each device."""
    if soft_cap is None:
        z = u
    else:
        x = u * (1.0 / soft_cap)
        t = tl.exp(-2.0 * tl.abs(x))
        far = 1.0 - 2.0 * t / (1.0 + t)
        s = x * x
        series = tl.fma(tl.fma(tl.fma(tl.fma(s, A4, A3), s, A2), s, A1), s, A0)
        near = tl.fma(x, s * series, x)
        z = soft_cap * tl.where(tl.abs(x) < SMALL, near, tl.where(x < 0, -far, far))
    return z


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0: the quotient corrects the rounding of 1 + x."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _load(ptr, columns, readable, RAGGED: tl.constexpr):
    x = tl.load(ptr + columns, mask=columns < readable, other=0.0) if RAGGED else tl.load(ptr + columns)
    return x.to(tl.float32)


@triton.jit
def _store(ptr, x, tile, V, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    if RAGGED:
        tl.store(ptr + columns, x, mask=columns < V)
    else:
        tl.store(ptr + columns, x)
