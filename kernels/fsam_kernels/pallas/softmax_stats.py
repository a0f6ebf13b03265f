"""Row statistics of a head in one pass over logits that never leave the chip: `xla.softmax_stats` on a TPU.

A grid step takes a block of rows and a block of the vocabulary. It computes their logits z in the matrix units and, at
the same time, folds them into running statistics of each row: the largest z, Σ exp(z − ref) without the target column,
z at the target. The statistics are 128 lanes wide and are reduced across lanes once for each block of rows. The kernel
can also write E = exp(z − ref), from which the cotangent is computed later. In bfloat16, E has an error of 2⁻⁹ relative
to every entry; with bfloat16 logits it would be |z| 2⁻⁹.

`ref` is one number a row, fixed before the pass: the largest of the row's first 128 logits, rounded to an integer so
that z − ref is exact. Its product has 1/256 the size of the whole at V = 32768. exp and its sum fit in float32 as long
as no logit exceeds ref by more than `RANGE`, which logits of normal size never do. Rows where one does are recomputed
with their largest logit as ref.

Measured on v5e and v6e (offline compiler, C = 8192, D = 1024, V = 32768, bfloat16, million cycles; the product alone
takes 4.19 and 1.05 at the matrix units' peak). Blocks of 1024 rows and 1024 entries, as used: 4.27 and 1.39 with E,
4.26 and 1.34 without. Slower, or no faster:
* 1024 rows and 512 entries: 4.33 and 1.47. There, a running maximum instead of ref, without E: 4.33 and 1.60. A running
  maximum would also need a scale for every tile of E, which rules out one factor a row;
* a loop over slabs of rows instead of unrolled code: 4.52 and 1.78, where unrolled code took 4.33 and 1.53;
* logits in scratch memory, with the statistics of one block during the product of the next: 4.28 and 1.48 unrolled,
  4.70 and 2.00 in a loop, 5.50 and 2.29 with a loop over D and the statistics of the previous grid step inside it.
The unrolled code has more partial sums of the product than registers, so the compiler stores some of them in vector
memory and reads them back ("spills"). They use free slots of bundles that are issued anyway. The product alone spills
too. Without spills (partial sums added up in scratch memory, in a loop) the product alone takes 4.34 and 1.30.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fsam_kernels.options import Loss
from fsam_kernels.xla import chunks
from fsam_kernels.xla import softmax_stats as plain
from fsam_kernels.xla.softmax_stats import RowStats

LANES = 128
# exp(z − ref) summed over a vocabulary of e^17 stays below the largest float32, e^88.7.
RANGE = 70.0
# Unrolled code grows with the block: 2^30 multiply-adds are 18,000 bundles on v5e and over 10 s of compilation.
_WORK = 2**30
_LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """E_CxV = exp(z − ref) in the dtype of the head, undefined at the target; ref_C in float32."""

    e_CxV: jax.Array
    ref_C: jax.Array


class Blocks(NamedTuple):
    """The rows and vocabulary entries of a grid step, and the rows of one product within it."""

    rows: int
    vocabulary: int
    slab: int = 256


def forward(
    h_CxD: jax.Array,
    w_VxD: jax.Array,
    bias_V: jax.Array | None,
    labels_C: jax.Array,
    loss: Loss,
    *,
    tiles: bool,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams | None = None,
) -> tuple[RowStats, Tiles | None]:
    """(the rows' statistics in float32, the input of `operand` or None), as `xla.softmax_stats.forward`.

    Args:
        h_CxD, w_VxD: bfloat16 or float32; any other dtype is cast to float32, which is multiplied in full precision.
        bias_V: added to the logits, or None.
        labels_C: a row with a negative label is ignored; a label ≥ V gives a NaN loss.
        tiles: write E.
        blocks: None for the largest that fit in the chip's vector memory.
        interpret: run in Pallas' interpreter, with True including its check for races; None for `interpreted()`.

    Raises:
        ValueError: where no block fits in the chip's vector memory.
    """
    dtype = h_CxD.dtype if h_CxD.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    h_CxD, w_VxD = h_CxD.astype(dtype), w_VxD.astype(dtype)
    V, labels_C = len(w_VxD), labels_C.astype(jnp.int32)
    run = functools.partial(_run, h_CxD, w_VxD, bias_V, labels_C, loss=loss, tiles=tiles, blocks=blocks)
    run = functools.partial(run, interpret=interpreted() if interpret is None else interpret)
    ref_C = _guess(h_CxD, w_VxD[:LANES], None if bias_V is None else bias_V[:LANES], loss)
    stats, e_CxV = run(ref_C)

    def too_low(state: Any) -> jax.Array:
        ref_C, stats, _ = state
        return jnp.any(stats.top_C - ref_C > RANGE)  # NaN compares false, so such a row does not loop forever

    def rerun(state: Any) -> Any:
        ref_C, stats, _ = state
        ref_C = jnp.where(stats.top_C - ref_C > RANGE, jnp.round(stats.top_C), ref_C)
        return ref_C, *run(ref_C)

    # A conditional branch, written as a loop that almost always runs 0 times and otherwise once, because XLA writes a
    # loop's result in place. `fsam profile tpu` excludes the cycles under this scope from its sums.
    with jax.named_scope("conditional branch"):
        ref_C, stats, e_CxV = jax.lax.while_loop(too_low, rerun, (ref_C, stats, e_CxV))
    rows = _rows(ref_C, stats, labels_C, V, loss)
    return rows, Tiles(e_CxV, ref_C) if e_CxV is not None else None


def operand(tiles: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> jax.Array:
    """P_CxV, the cotangent of unweighted rows, in `dtype`: elementwise, so that XLA can fuse it into a product."""
    scale_C = rows.scale_C * _exp(tiles.ref_C - rows.top_C)
    return plain.assemble(tiles.e_CxV * scale_C[:, None], rows, labels_C, loss).astype(dtype)


def scaled_operand(
    tiles: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(Q_CxV in `dtype`, factor_C in float32) with P = factor Q: the same cotangent with a factor for each row.

    Q is E except in the target column (and for label smoothing's s/V), so the factor can multiply D values a row
    instead of V: h̄ = (weights factor) (Q W), w̄ = Qᵀ ((weights factor) h). Both products at C = 8192, D = 1024, V =
    32768 take 8.74 and 2.79 million cycles on v5e and v6e (offline compiler; the bare products 8.61 and 2.73). XLA with
    `operand` takes 8.80 and 3.02, and 9.07 and 3.12 if it also fuses the weights into h. The product (weights h) is
    therefore computed before, behind an optimization barrier.
    """
    factor_C = rows.scale_C * _exp(tiles.ref_C - rows.top_C)
    if dtype == jnp.float16:  # 1 / factor would overflow
        return operand(tiles, rows, labels_C, loss, dtype), jnp.ones_like(factor_C)
    inverse_C = jnp.where(factor_C != 0, 1 / factor_C, 0)
    scaled = rows._replace(target_C=rows.target_C * inverse_C)
    q_CxV = tiles.e_CxV.astype(jnp.float32)
    if loss.label_smoothing:
        q_CxV = q_CxV - (loss.floor(q_CxV.shape[1]) * inverse_C)[:, None]
    q_CxV = jnp.where(plain.is_target(labels_C, q_CxV.shape[1]), scaled.target_C[:, None], q_CxV)
    return q_CxV.astype(dtype), factor_C


def keep(tiles: Any, rows: RowStats, labels_C: jax.Array, loss: Loss, dtype: Any) -> Tiles:
    """What a kept cotangent stores: the tiles themselves, so that keeping them costs no more work."""
    return tiles


scaled_kept = scaled_operand


def chunk_count(N: int, V: int, itemsize: int, chunk_bytes: int | None, *, keep: bool) -> int:
    """The number of chunks for N rows of a device: a row has its E; where E is kept, chunks would save nothing."""
    return 1 if keep else chunks.count(N, V * itemsize, chunk_bytes)


def interpreted() -> bool:
    """Whether kernels run in the interpreter: everywhere except on a TPU, unless FSAM_PALLAS_INTERPRET is 0 or 1.

    Ahead-of-time compilation for a TPU needs the variable, because the default device of that process is not a TPU.
    """
    asked = os.environ.get("FSAM_PALLAS_INTERPRET")
    return asked == "1" if asked in ("0", "1") else jax.default_backend() != "tpu"


class RunningStats(NamedTuple):
    """The results of one pass for a row: max z, Σ exp(z − ref) off the target, z at the target, Σ z (or 0)."""

    top_C: jax.Array
    others_C: jax.Array
    target_C: jax.Array
    total_C: jax.Array


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp2(x * _LOG2E)


def _guess(h_CxD: jax.Array, w_BxD: jax.Array, bias_B: jax.Array | None, loss: Loss) -> jax.Array:
    top_C = plain.capped(plain.logits(h_CxD, w_BxD, bias_B), loss).max(axis=-1)
    return jnp.where(jnp.isfinite(top_C), jnp.round(top_C), 0.0)


def _rows(ref_C: jax.Array, stats: RunningStats, labels_C: jax.Array, V: int, loss: Loss) -> RowStats:
    seen_C = labels_C >= 0
    target_C = jnp.where(labels_C < V, stats.target_C, jnp.nan)
    top_C = stats.top_C
    gap_C = jnp.where(seen_C, target_C - top_C, 0)
    others_C = stats.others_C * _exp(ref_C - top_C)
    sum_C = others_C + jnp.where(seen_C, jnp.exp(gap_C), 0)
    mean_C = stats.total_C / V if loss.label_smoothing else None
    return plain.row_stats(top_C, sum_C, others_C, gap_C, mean_C, labels_C, V, loss)


def _run(
    h_CxD: jax.Array,
    w_VxD: jax.Array,
    bias_V: jax.Array | None,
    labels_C: jax.Array,
    ref_C: jax.Array,
    *,
    loss: Loss,
    tiles: bool,
    blocks: Blocks | None,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[RunningStats, jax.Array | None]:
    """One pass of the kernel."""
    (C, D), V, dtype = h_CxD.shape, len(w_VxD), h_CxD.dtype
    capacity = None if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    B = blocks or choose_blocks(D, dtype.itemsize, tiles, capacity)
    rows, columns = min(B.rows, C), min(B.vocabulary, -(-V // LANES) * LANES)
    row_block = lambda width: pl.BlockSpec((rows, width), lambda i, j: (i, 0))
    vocabulary_block = pl.BlockSpec((columns, D), lambda i, j: (j, 0))
    inputs = [h_CxD, w_VxD, labels_C[:, None], ref_C[:, None]]
    in_specs = [row_block(D), vocabulary_block, row_block(1), row_block(1)]
    if bias_V is not None:
        inputs.append(bias_V.astype(jnp.float32)[None])
        in_specs.append(pl.BlockSpec((1, columns), lambda i, j: (0, j)))
    out = [jax.ShapeDtypeStruct((C, 4), jnp.float32)]
    out_specs = [row_block(4)]
    if tiles:
        out.append(jax.ShapeDtypeStruct((C, V), dtype))
        out_specs.append(pl.BlockSpec((rows, columns), lambda i, j: (i, j)))
    lanes = lambda kind: pltpu.VMEM((rows, LANES), kind)
    scratch = [lanes(jnp.float32)] * 4 + [lanes(jnp.int32), lanes(jnp.float32), pltpu.VMEM((rows, D), dtype)]
    kernel = functools.partial(
        _kernel, has_bias=bias_V is not None, tiles=tiles, loss=loss, V=V, slab=min(B.slab, rows), columns=columns
    )
    limit = None if capacity is None else vmem_bytes(B, D, dtype.itemsize, tiles)
    stats_Cx4, *e = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(C, rows), pl.cdiv(V, columns)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret is True else interpret,
        name="rows",
    )(*inputs)
    return RunningStats(*stats_Cx4.T), e[0] if e else None


def _kernel(
    h: Any,
    w: Any,
    labels: Any,
    ref: Any,
    *rest: Any,
    has_bias: bool,
    tiles: bool,
    loss: Loss,
    V: int,
    slab: int,
    columns: int,
) -> None:
    bias = rest[0] if has_bias else None
    out, e = rest[has_bias], rest[has_bias + 1] if tiles else None
    top, others, target, total, labels_lanes, ref_lanes, own_h = rest[has_bias + 1 + tiles :]
    rows, j, last = h.shape[0], pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(j == 0)
    def _start() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        for stat in (others, target, total):
            stat[...] = jnp.zeros_like(stat)
        labels_lanes[...] = jnp.broadcast_to(labels[...], labels_lanes.shape)
        ref_lanes[...] = jnp.broadcast_to(ref[...], ref_lanes.shape)
        own_h[...] = h[...]  # in the layout of the matrix units: 2 % fewer cycles on v6e, none on v5e

    def fold(ragged: bool) -> None:
        for start in range(0, rows, slab):
            part = pl.ds(start, min(slab, rows - start))
            u = _product(own_h[part, :], w[...])
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            y, r = labels_lanes[part, :] - j * columns, ref_lanes[part, :]
            m, s, t, a = top[part, :], others[part, :], target[part, :], total[part, :]
            for column in range(0, columns, LANES):
                here = slice(column, column + LANES)
                z = u[:, here] if bias is None else u[:, here] + bias[:, here]
                z = plain.capped(z, loss)
                is_target, inside = lane + column == y, lane + column < V - j * columns
                if ragged:  # values beyond the vocabulary are undefined, possibly NaN
                    z = jnp.where(inside, z, -jnp.inf)
                off = jnp.where(is_target, -jnp.inf, z)
                m = jnp.maximum(m, z)
                exp = _exp(off - r)
                s = s + exp
                t = t + jnp.where(is_target, z, 0)
                if loss.label_smoothing:
                    a = a + (jnp.where(inside, z, 0) if ragged else z)
                if e is not None:
                    e[part, here] = exp.astype(e.dtype)
            top[part, :], others[part, :], target[part, :] = m, s, t
            if loss.label_smoothing:
                total[part, :] = a

    if V % columns:
        pl.when(j < last)(lambda: fold(ragged=False))
        pl.when(j == last)(lambda: fold(ragged=True))
    else:
        fold(ragged=False)

    @pl.when(j == last)
    def _finish() -> None:
        across: list[Callable[[], jax.Array]] = [
            lambda: top[...].max(axis=1, keepdims=True),
            lambda: others[...].sum(axis=1, keepdims=True),
            lambda: target[...].sum(axis=1, keepdims=True),
            lambda: total[...].sum(axis=1, keepdims=True),
        ]
        lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
        stats = jnp.zeros(out.shape, jnp.float32)
        for i, stat in enumerate(across):
            stats = jnp.where(lane == i, stat(), stats)
        out[...] = stats


def _product(a_RxD: jax.Array, b_BxD: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a_RxD.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a_RxD, b_BxD, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def vmem_bytes(blocks: Blocks, D: int, itemsize: int, tiles: bool) -> int:
    """Vector memory of a grid step. Windows are double-buffered: the next one is copied while one is used."""
    R, B, row_bytes = blocks.rows, blocks.vocabulary, LANES * 4
    D = -(-D // LANES) * LANES
    windows = (
        R * D * itemsize  # h
        + B * D * itemsize  # w
        + 3 * R * row_bytes  # labels, ref and the result: one value a row, padded to a row of lanes
        + 8 * B * 4  # bias
        + (R * B * itemsize if tiles else 0)  # E
    )
    scratch = 6 * R * row_bytes + R * D * itemsize  # running statistics, labels and ref, 128 lanes each; h
    spare = R * B * 4 + 2**20  # the compiler's own: partial sums of a product, constants
    return 2 * windows + scratch + spare


def choose_blocks(D: int, itemsize: int, tiles: bool, capacity: int | None) -> Blocks:
    """The largest blocks that fit in 15/16 of a chip's vector memory, `capacity`; None for no limit.

    Raises:
        ValueError: where no block fits.
    """
    sizes = [(R, B) for R in (1024, 512, 256, 128) for B in (1024, 512, 256, 128) if R >= B]
    for R, B in sorted(sizes, key=lambda x: (-x[0] * x[1], -x[0])):
        blocks = Blocks(R, B)
        small = R * B * D * (6 if itemsize == 4 else 1) <= _WORK or (R, B) == (128, 128)
        if small and (capacity is None or vmem_bytes(blocks, D, itemsize, tiles) <= capacity * 15 // 16):
            return blocks
    raise ValueError(
        f"h_CxD: no block of rows of {D} features fits in the {capacity} bytes of vector memory; use backend xla"
    )
