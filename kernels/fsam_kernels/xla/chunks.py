"""Processing rows in chunks, so that no N×V array is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.memory import default_chunk_bytes
from fsam_kernels.options import Loss
from fsam_kernels.xla.device import traced_for


def shards(row_axes: tuple[str, ...]) -> int:
    """The number of devices along these axes of the current mesh.

    Raises:
        ValueError: where there is no current mesh, or it lacks one of the axes.
    """
    if not row_axes:
        return 1
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if missing := [axis for axis in row_axes if axis not in sizes]:
        has = ", ".join(sizes) or "none: call it under jax.set_mesh(mesh)"
        raise ValueError(f"row_axes: the mesh in use has no axis {', '.join(missing)}; it has {has}")
    return math.prod(sizes[axis] for axis in row_axes)


def count(N: int, row_bytes: int, chunk_bytes: int | None) -> int:
    """The number of chunks for the N rows of one device, of `row_bytes` bytes each.

    `chunk_bytes` None stands for `memory.default_chunk_bytes` of the platform that is compiled for. A number that
    divides N is preferred, up to twice as many chunks, because then nothing is padded.
    """
    budget = default_chunk_bytes(traced_for()) if chunk_bytes is None else chunk_bytes
    rows = max(1, budget // row_bytes)
    least = max(1, -(-N // rows))  # also of no rows at all
    return next((m for m in range(least, min(2 * least, N) + 1) if N % m == 0), least)


def split(x_N: jax.Array, m: int, fill: Any = 0, *, strided: bool = True) -> jax.Array:
    """[N, …] as [m, C, …], with rows of `fill` where m does not divide N.

    Strided, chunk j holds the rows j, j + m, j + 2m, …. Where N is sharded over devices, every chunk then has rows of
    every device, and a loop over chunks moves nothing between them. It costs a copy of h and of h̄, 4 % of the first
    pass at 2048 rows a chunk (v5e). Rows of a single device are therefore split into consecutive rows.
    """
    N = len(x_N)
    C = -(-N // m)
    if C * m != N:
        x_N = jnp.concatenate([x_N, jnp.full((C * m - N, *x_N.shape[1:]), fill, x_N.dtype)])
    if not strided:
        return x_N.reshape(m, C, *x_N.shape[1:])
    return x_N.reshape(C, m, *x_N.shape[1:]).swapaxes(0, 1)


def join(x_mxC: jax.Array, N: int, *, strided: bool = True) -> jax.Array:
    """The inverse of `split`."""
    x_mxC = x_mxC.swapaxes(0, 1) if strided else x_mxC
    return x_mxC.reshape(-1, *x_mxC.shape[2:])[:N]


def each(one: Callable[[Any, Any], tuple[Any, Any]], sums: Any, chunks: Any) -> tuple[Any, Any]:
    """Call one(sums, chunk) -> (sums, result of the chunk) for all chunks, in a loop if there is more than one.

    Measured dead ends. The loop takes 15.4 Mcycles and 403 MB of temporaries (v5e, N = 8192, D = 1024, V = 32768,
    bfloat16, Pallas, 2048 rows a chunk). Unrolled it takes 14.6 and 1211 MB, because XLA holds all chunks at once.
    Unrolled with a barrier between chunks it takes 15.3 and 280 MB, and every further chunk compiles longer.
    """
    if len(jax.tree.leaves(chunks)[0]) > 1:
        return jax.lax.scan(one, sums, chunks)
    sums, out = one(sums, jax.tree.map(lambda x: x[0], chunks))
    return sums, jax.tree.map(lambda x: x[None], out)


def summing(N: int, m: int, row_axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes along which every device keeps its own sum over the m chunks: `row_axes`, or none.

    They are `row_axes` where there are several chunks and every device has equally many rows of each. Otherwise the
    compiler reduces over the devices once a chunk.
    """
    return row_axes if m > 1 and -(-N // m) % shards(row_axes) == 0 else ()


def by_device(x: jax.Array, row_axes: tuple[str, ...]) -> jax.Array:
    """Shard an array whose first axis stands for the devices of `row_axes`, one entry on each device."""
    if not row_axes:
        return x
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    spec = jax.sharding.PartitionSpec(row_axes, *(free for _ in x.shape[1:]))
    return jax.lax.with_sharding_constraint(x, spec)


def on_each_device(forward: Callable[..., Any], row_axes: tuple[str, ...]) -> Callable[..., Any]:
    """A backend's `forward` on each device's own rows: the compiler cannot partition a compiled kernel itself."""
    if not row_axes:
        return forward
    rows, whole = jax.sharding.PartitionSpec(row_axes), jax.sharding.PartitionSpec()

    def sharded(h_CxD: Any, w_VxD: Any, bias_V: Any, labels_C: Any, loss: Loss, *, tiles: bool) -> Any:
        local = lambda h, w, b, y: forward(h, w, b, y, loss, tiles=tiles)
        # check_vma is off because a kernel's outputs do not say over which axes they vary.
        return jax.shard_map(local, in_specs=(rows, whole, whole, rows), out_specs=rows, check_vma=False)(
            h_CxD, w_VxD, bias_V, labels_C
        )

    return sharded
