"""Rows taken in chunks, so that no N×V array is ever whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.memory import default_chunk_bytes


def count(N: int, V: int, itemsize: int, chunk_bytes: int | None) -> int:
    """Into how many chunks N rows go: their float32 logits and the operand made of them fill about `chunk_bytes`.

    None takes `memory.default_chunk_bytes` of the platform that is compiled for. A number of chunks that divides N is
    preferred, up to twice as many, because then nothing is padded.
    """
    budget = default_chunk_bytes(jax.default_backend()) if chunk_bytes is None else chunk_bytes
    rows = max(1, budget // (V * (4 + itemsize)))
    least = -(-N // rows)
    return next((m for m in range(least, min(2 * least, N) + 1) if N % m == 0), least)


def split(x_N: jax.Array, m: int, fill: Any = 0) -> jax.Array:
    """[N, …] as [m, C, …]: chunk j holds the rows j, j + m, j + 2m, …, with rows of `fill` where m does not divide N.

    Strided, not contiguous: where N is sharded over devices every chunk then has rows of every device, and a loop over
    chunks moves nothing between them.
    """
    N = len(x_N)
    C = -(-N // m)
    if C * m != N:
        x_N = jnp.concatenate([x_N, jnp.full((C * m - N, *x_N.shape[1:]), fill, x_N.dtype)])
    return x_N.reshape(C, m, *x_N.shape[1:]).swapaxes(0, 1)


def join(x_mxC: jax.Array, N: int) -> jax.Array:
    """The inverse of `split`."""
    return x_mxC.swapaxes(0, 1).reshape(-1, *x_mxC.shape[2:])[:N]


def each(one: Callable[[Any, Any], tuple[Any, Any]], sums: Any, chunks: Any) -> tuple[Any, Any]:
    """one(sums, chunk) -> (sums, of the chunk) over all chunks; a single one is not put into a loop."""
    if len(jax.tree.leaves(chunks)[0]) > 1:
        return jax.lax.scan(one, sums, chunks)
    sums, out = one(sums, jax.tree.map(lambda x: x[0], chunks))
    return sums, jax.tree.map(lambda x: x[None], out)
