"""What happens to a chunk of logits between the matrix products, in Triton; contracts as in the `torch` backend.

    statistics      tile_statistics, grid C · T: one pass over the logits -> 2 or 3 values a row and tile of BLOCK
                    combine, grid C · T / 1024: those values -> the row's figures
    part            tile_statistics, and of those values one tile's in PyTorch, for a vocabulary over ranks
    cotangent       cotangent, grid C · T: logits -> P, in place where the dtypes agree
    through_cap_    through_cap, grid C · T

Bytes a logit, b of them a stored logit (2 in bfloat16): b to read for the statistics, 2b for the cotangent, and 3b more
under a soft-cap. The tiles' own values come to 16 / 4096 of a byte, their writing and their reading together.

What was counted and not built, with D features, in bfloat16, at an H100's published 989 TFLOP/s and 3.35 TB/s:

    scaled tiles    The first pass writes E = bf16(2^(z log2 e − k)) over the logits, k an integer of each row and tile,
                    and an apply pass turns E into P: 2b + 2b = 8 bytes a logit where the above moves 6, and a kept E
                    needs the apply pass again at (h', W') where a kept P needs nothing. It saves one of two
                    exponentials; at 16 a cycle and multiprocessor (1.7 GHz) those take 0.47 of the time of the 2 bytes
                    that the statistics read, so they hide. P is stored to the same 2⁻⁹ relative as E would be.
    fused recompute No logits in memory: saves those 6 bytes a logit, 1.8 ps, and pays matrix products instead. Rows
                    of h̄ are sums over all columns and rows of W̄ over all tokens, so one program cannot own both: either
                    each has its own kernel and recomputes the logits, 4D FLOP a logit (4.1 ps at D = 1024), or one is
                    summed by atomics, 2D FLOP (2.1 ps) and 4 bytes · N D V / tile besides. Behind for every D > 440,
                    or > 890 were atomics free, at a peak rate that only the library's products come near. Below
                    (the tiny and 2m presets) it is ahead by this count, which leaves out how far a fused kernel stays
                    from that peak; it was not built for those two.

Rows of logits that start at multiples of 16 bytes move 16 bytes at a time, others one element at a time: make chunks of
logits with `empty_chunk`, whose rows are padded (V = 50257 needs it).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fsam_kernels.options import Loss
from fsam_kernels.torch import softmax_stats as plain
from fsam_kernels.torch.softmax_stats import Part, Rows
from fsam_kernels.triton import tiles

# Columns of a tile. Eight warps hold 16 values a thread: 32 to 72 registers on sm_90 at V = 50257, and four 44 to 127.
BLOCK, WARPS = 4096, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAD = 16  # elements: Triton knows a stride to be aligned when it is a multiple of 16


def empty_chunk(C: int, V: int, like: Tensor) -> Tensor:
    """An uninitialised [C, V] of the dtype and device of `like`, with a row stride of V rounded up to 16 elements.

    The padding is zero. PyTorch's bfloat16 product on a CPU with AMX reads past V columns of such an operand, and
    multiplies what it finds by 0: with NaN in the padding half of its results were NaN.
    """
    chunk = like.new_empty(C, triton.cdiv(V, PAD) * PAD)
    chunk[:, V:] = 0
    return chunk[:, :V]


def statistics(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Rows, Tensor]:
    """(the rows' figures in float32, the logits as they came, for `cotangent` to go on from).

    Args:
        u_CxV: raw logits in float32, bfloat16 or float16; rows contiguous, at any stride.
        labels_C: int64; a negative one makes its row ignored, one ≥ V makes its loss, lse and cotangent NaN.

    Raises:
        ValueError: for another dtype or for columns that are not contiguous.
    """
    C, V = _checked(u_CxV).shape
    T = triton.cdiv(V, BLOCK)
    padded = triton.cdiv(C, PAD) * PAD
    rows = Rows(*u_CxV.new_empty(len(Rows._fields), padded, dtype=torch.float32)[:, :C])
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


def part(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> tuple[Part, Tensor]:
    """(what these columns of a wider vocabulary add to the rows' figures, the logits as they came).

    Of the tiles' values, 4096 times fewer than logits, in PyTorch. A label ≥ V is of a column that is not among these.

    Raises:
        ValueError: as `statistics`.
    """
    C, V = _checked(u_CxV).shape
    if C * V == 0:
        return plain.part(u_CxV, labels_C, loss)[0], u_CxV
    top_TxC, others_TxC, target_C, total_TxC = _tile_values(u_CxV, labels_C.contiguous(), loss)
    top_TxC, others_TxC = top_TxC[:, :C], others_TxC[:, :C]
    top_C = top_TxC.amax(0)
    others_C = (others_TxC * (top_TxC - plain.finite(top_C)).exp()).sum(0)
    here_C = (labels_C >= 0) & (labels_C < V)
    total_C = None if total_TxC is None else total_TxC[:, :C].sum(0)
    return Part(top_C, others_C, torch.where(here_C, target_C[:C], -torch.inf), total_C), u_CxV


def _tile_values(u_CxV: Tensor, labels_C: Tensor, loss: Loss) -> Part:
    """Of each tile what `Part` holds of one, [T, C], but for the target's z, [C], which is written where it is found.

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
    return Part(top_TxC, others_TxC, target_C, total_TxC)


def rows_of_combine(T: int) -> int:
    """Rows of one program of `combine`, which together have 1024 tiles: 8 values in each thread of four warps."""
    return max(4, 1024 // triton.next_power_of_2(T))


def readable(u_CxV: Tensor) -> int:
    """Columns that may be read: V, or V rounded up to PAD where every row has the memory for it."""
    C, V = u_CxV.shape
    padded = triton.cdiv(V, PAD) * PAD
    end = u_CxV.storage_offset() + (C - 1) * u_CxV.stride(0) + padded
    roomy = u_CxV.stride(0) >= padded and end * u_CxV.itemsize <= u_CxV.untyped_storage().nbytes()
    return padded if roomy else V


def exponentials(u_CxV: Tensor, top_C: Tensor, loss: Loss) -> Tensor:
    """What `cotangent` goes on from where the rows' figures are known: the logits themselves."""
    return _checked(u_CxV)


def cotangent(u_CxV: Tensor, rows: Rows, labels_C: Tensor, loss: Loss, out_CxV: Tensor) -> None:
    """P, the cotangent of unweighted rows, into `out_CxV`, which may be `u_CxV`.

    P_v = scale exp(z_v − top) − s/V off the target, P_y = target; exactly 0 where the label is negative. The target of
    a label ≥ V is in none of these columns.

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
    """P times the soft-cap's derivative 1 − tanh²(u / c), in place.

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
