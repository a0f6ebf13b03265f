"""The work on a chunk of logits between the matrix products, in Triton; contracts as in the `torch` backend.

    statistics            tile_statistics, grid C · T: one pass over the logits -> 2 or 3 values a row and tile of BLOCK
                          combine, grid C · T / 1024: these values -> the row statistics
    partial_statistics    tile_statistics, and a reduction over the tiles in PyTorch, for a vocabulary over ranks
    cotangent             cotangent, grid C · T: logits -> P, in place where the dtypes agree
    through_cap_          through_cap, grid C · T

A stored logit has b bytes (2 in bfloat16). The statistics read b bytes a logit, the cotangent moves 2b, and a soft-cap
3b more. The values of the tiles add 16 / 4096 of a byte, writing and reading together.

Designs that were counted and not built, with D features, in bfloat16, at an H100's published 989 TFLOP/s and 3.35 TB/s:

    scaled tiles    The first pass writes E = bf16(2^(z log2 e − k)) over the logits, k an integer of each row and tile,
                    and an apply pass turns E into P. That is 2b + 2b = 8 bytes a logit, where the design above moves 6.
                    A kept E also needs the apply pass again at (h', W'), where a kept P needs nothing. It saves one of
                    two exponentials. At 16 a cycle and multiprocessor (1.7 GHz) these take 0.47 of the time of the 2
                    bytes that the statistics read, so they are hidden. P is stored to the same 2⁻⁹ relative as E.
    fused recompute No logits in memory. It saves these 6 bytes a logit, 1.8 ps, and needs more matrix products. Rows of
                    h̄ are sums over all columns and rows of W̄ over all tokens, so one program cannot own both. Either
                    each has its own kernel and recomputes the logits, 4D FLOP a logit (4.1 ps at D = 1024), or one is
                    summed by atomics, 2D FLOP (2.1 ps) and 4 bytes · N D V / tile more. It is slower for every D > 440,
                    or > 890 if atomics were free, at a peak rate that only the library's products approach. Below that
                    (the tiny and 2m presets) it is faster by this count, which ignores how far a fused kernel stays
                    below the peak; it was not built for those two.

Loads and stores are 16 bytes wide where the rows of logits start at multiples of 16 bytes, and one element wide
elsewhere. `empty_chunk` pads the rows for that (V = 50257 needs it).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fsam_kernels.options import Loss
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.softmax_stats import PartialStats, RowStats
from fsam_kernels.triton import tiles

# Columns of a tile. Eight warps hold 16 values a thread: 32 to 72 registers on sm_90 at V = 50257; four warps
# 44 to 127.
BLOCK, WARPS = 4096, 8
IN_PLACE = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAD = 16  # elements; Triton treats a stride as aligned where it is a multiple of 16


def empty_chunk(C: int, V: int, like: Tensor) -> Tensor:
    """An uninitialised [C, V] of the dtype and device of `like`, with a row stride of V rounded up to 16 elements.

    The padding is zero. PyTorch's bfloat16 product on a CPU with AMX reads beyond the V columns of such an operand and
    multiplies the padding by 0: with NaN in the padding, half of its results were NaN.
    """
    chunk = like.new_empty(C, triton.cdiv(V, PAD) * PAD)
    if chunk.shape[1] > V:
        chunk[:, V:].zero_()
    return chunk[:, :V]


def statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[RowStats, Tensor]:
    """(the rows' statistics in float32, the logits themselves for `cotangent`).

    Args:
        u_CxV: raw logits in float32, bfloat16 or float16; rows contiguous, at any stride.
        labels_C: int64; a row with a negative label is ignored; a label ≥ V makes the row's loss, lse and cotangent
            NaN.

    Raises:
        ValueError: for another dtype or for columns that are not contiguous.
    """
    C, V = _checked(u_CxV).shape
    T = triton.cdiv(V, BLOCK)
    padded = triton.cdiv(C, PAD) * PAD
    rows = RowStats(*u_CxV.new_empty(len(RowStats._fields), padded, dtype=torch.float32)[:, :C])
    if C == 0:
        return rows, u_CxV
    labels_C = labels_C.contiguous()
    top_TxC, others_TxC, target_C, total_TxC = _tile_values(u_CxV, labels_C, loss)
    with torch.cuda.device_of(u_CxV):
        block = rows_of_combine(T)
        tiles.combine[triton.cdiv(C, block),](
            top_TxC, others_TxC, total_TxC, target_C,
            labels_C, *rows, C, V, T, padded, loss.label_smoothing or None, loss.z_loss or None,
            ROWS=block, TILES=triton.next_power_of_2(T), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return rows, u_CxV


def partial_statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[PartialStats, Tensor]:
    """(the rows' statistics over these V columns of a larger vocabulary, the logits themselves for `cotangent`).

    PyTorch reduces the values of the tiles, 4096 times fewer than logits. A label ≥ V belongs to another column.

    Raises:
        ValueError: as `statistics`.
    """
    C, V = _checked(u_CxV).shape
    if C * V == 0:
        return plain.partial_statistics(u_CxV, labels_C, loss)[0], u_CxV
    top_TxC, others_TxC, target_C, total_TxC = _tile_values(u_CxV, labels_C.contiguous(), loss)
    top_TxC, others_TxC = top_TxC[:, :C], others_TxC[:, :C]
    top_C = top_TxC.amax(0)
    others_C = (others_TxC * (top_TxC - plain.finite_top(top_C)).exp()).sum(0)
    here_C = (labels_C >= 0) & (labels_C < V)
    total_C = None if total_TxC is None else total_TxC[:, :C].sum(0)
    return PartialStats(top_C, others_C, torch.where(here_C, target_C[:C], -torch.inf), total_C), u_CxV


def _tile_values(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> PartialStats:
    """The `PartialStats` of each tile, [T, C]; the target's z is [C], written by the tile that holds it.

    Rows are padded to a multiple of PAD, for `combine`.
    """
    C, V = u_CxV.shape
    T, padded = triton.cdiv(V, BLOCK), triton.cdiv(C, PAD) * PAD
    scratch = u_CxV.new_empty((3 if loss.label_smoothing else 2) * T + 1, padded, dtype=torch.float32)
    target_C, top_TxC, others_TxC = scratch[0], scratch[1 : T + 1], scratch[T + 1 : 2 * T + 1]
    total_TxC = scratch[2 * T + 1 :] if loss.label_smoothing else None
    with torch.cuda.device_of(u_CxV):
        tiles.tile_statistics[C * T,](
            u_CxV, labels_C, top_TxC, others_TxC, total_TxC, target_C,
            V, readable(u_CxV), T, u_CxV.stride(0), padded, loss.soft_cap,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return PartialStats(top_TxC, others_TxC, target_C, total_TxC)


def rows_of_combine(T: int) -> int:
    """The rows of one program of `combine`: together 1024 tiles, 8 values in each thread of four warps."""
    return max(4, 1024 // triton.next_power_of_2(T))


def readable(u_CxV: Tensor) -> int:
    """The columns that may be read: V, or V rounded up to PAD where every row's storage reaches that far."""
    C, V = u_CxV.shape
    padded = triton.cdiv(V, PAD) * PAD
    end = u_CxV.storage_offset() + (C - 1) * u_CxV.stride(0) + padded
    roomy = u_CxV.stride(0) >= padded and end * u_CxV.itemsize <= u_CxV.untyped_storage().nbytes()
    return padded if roomy else V


def exponentials(u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor:
    """The logits themselves, which `cotangent` takes."""
    return _checked(u_CxV)


def cotangent(u_CxV: Tensor, rows: RowStats, labels_C: Tensor, loss: Loss, out_CxV: Tensor) -> None:
    """Write P, the cotangent of unweighted rows, to `out_CxV`, which may be `u_CxV`.

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; exactly 0 where the label is negative. The target of
    a label ≥ V is not among these columns.

    Raises:
        ValueError: as `statistics`, for either tensor.
    """
    C, V = _checked(u_CxV).shape
    T = triton.cdiv(V, BLOCK)
    if C * V == 0:
        return
    with torch.cuda.device_of(u_CxV):
        tiles.cotangent[C * T,](
            u_CxV, rows.top_C, rows.scale_C, rows.target_C, labels_C.contiguous(), _checked(out_CxV),
            V, readable(u_CxV), T, u_CxV.stride(0), out_CxV.stride(0), loss.label_smoothing or None, loss.soft_cap,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def through_cap_(p_CxV: Tensor, u_CxV: Tensor, soft_cap: float) -> None:
    """Multiply P by the soft-cap's derivative 1 − tanh²(u / c), in place.

    Raises:
        ValueError: as `statistics`, for either tensor.
    """
    C, V = _checked(p_CxV).shape
    T = triton.cdiv(V, BLOCK)
    if C * V == 0:
        return
    with torch.cuda.device_of(u_CxV):
        tiles.through_cap[C * T,](
            p_CxV, _checked(u_CxV), V, readable(p_CxV), readable(u_CxV), T, p_CxV.stride(0), u_CxV.stride(0), soft_cap,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _checked(x_CxV: Tensor) -> Tensor:
    if x_CxV.dtype not in DTYPES:
        raise ValueError(f"logits: the triton backend takes float32, bfloat16 and float16, got {x_CxV.dtype}")
    if x_CxV.shape[1] > 1 and x_CxV.stride(1) != 1:
        raise ValueError(f"logits: columns must be contiguous, got strides {x_CxV.stride()}; call .contiguous()")
    return x_CxV
