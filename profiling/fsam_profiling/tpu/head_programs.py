"""The programs of a head that the TPU compiler compiles: its passes, and the programs they are compared with.

Each takes a shape and options that JSON can hold, and returns (function, arguments) for `compiler.compile_for`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_kernels.options import CROSS_ENTROPY
from fsam_kernels.xla.linear_cross_entropy import linear_cross_entropy
from fsam_kernels.xla.logit_vjp import logit_vjp

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def arrays(N: int, D: int, V: int, dtype: str) -> tuple[Any, ...]:
    """h_NxD, w_VxD, labels_N, weights_N by shape and dtype."""
    of = jax.ShapeDtypeStruct
    return of((N, D), dtype), of((V, D), dtype), of((N,), jnp.int32), of((N,), jnp.float32)


def products(N: int, D: int, V: int, dtype: str = "bfloat16", *, logits: bool = True) -> Program:
    """The bare matrix products of a pass: h Wᵀ where it needs `logits`, P W and Pᵀ h, each result in `dtype`."""
    h, w, *_ = arrays(N, D, V, dtype)

    def function(h_NxD: jax.Array, w_VxD: jax.Array, p_NxV: jax.Array) -> Any:
        pull = p_NxV @ w_VxD, p_NxV.T @ h_NxD
        return (h_NxD @ w_VxD.T, *pull) if logits else pull

    return function, (h, w, jax.ShapeDtypeStruct((N, V), dtype))


def log_softmax(N: int, D: int, V: int, dtype: str = "bfloat16") -> Program:
    """The loss and both gradients as written without this package: log-softmax of all logits, and autodiff."""

    def loss(h_NxD: jax.Array, w_VxD: jax.Array, labels_N: jax.Array) -> jax.Array:
        logp_NxV = jax.nn.log_softmax((h_NxD @ w_VxD.T).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logp_NxV, labels_N[:, None], axis=1))

    return jax.value_and_grad(loss, (0, 1)), arrays(N, D, V, dtype)[:3]


def row_stats(
    N: int, D: int, V: int, dtype: str = "bfloat16", *, backend: str = "pallas", tiles: bool = True
) -> Program:
    """The forward stage alone: a pass over the logits for the row statistics, with `tiles` also those that make P."""
    softmax = importlib.import_module(f"fsam_kernels.{backend}.softmax_stats")

    def function(h_NxD: jax.Array, w_VxD: jax.Array, labels_N: jax.Array) -> Any:
        return softmax.forward(h_NxD, w_VxD, None, labels_N, CROSS_ENTROPY, tiles=tiles)

    return function, arrays(N, D, V, dtype)[:3]


def first_pass(
    N: int,
    D: int,
    V: int,
    dtype: str = "bfloat16",
    *,
    backend: str,
    rows: int,
    keep: bool = False,
    upcast_wbar: bool = False,
) -> Program:
    """Loss, both gradients and the cotangent of `linear_cross_entropy`, in chunks of `rows` rows."""
    softmax = importlib.import_module(f"fsam_kernels.{backend}.softmax_stats")
    arguments = arrays(N, D, V, dtype)

    def function(h_NxD: jax.Array, w_VxD: jax.Array, labels_N: jax.Array, weights_N: jax.Array) -> Any:
        loss_N, lse_N, cotangent, gradients = linear_cross_entropy(
            h_NxD,
            w_VxD,
            labels_N,
            weights_N,
            gradient=True,
            keep=keep,
            upcast_wbar=upcast_wbar,
            chunk_bytes=_chunk_bytes(backend, rows, V, dtype),
            softmax=softmax,
        )
        held = (cotangent.kept, cotangent.top_N, cotangent.scale_N, cotangent.target_N) if keep else ()
        return loss_N, lse_N, gradients, held

    return function, arguments


def second_pass(
    N: int, D: int, V: int, dtype: str = "bfloat16", *, backend: str, rows: int, keep: bool = True
) -> Program:
    """`logit_vjp` of a cotangent that was kept or is recomputed, in chunks of `rows` rows."""
    softmax = importlib.import_module(f"fsam_kernels.{backend}.softmax_stats")
    h, w, labels, weights = arrays(N, D, V, dtype)

    def cotangent_of(h_NxD: jax.Array, w_VxD: jax.Array, labels_N: jax.Array, weights_N: jax.Array) -> Any:
        return linear_cross_entropy(
            h_NxD,
            w_VxD,
            labels_N,
            weights_N,
            keep=keep,
            chunk_bytes=_chunk_bytes(backend, rows, V, dtype),
            softmax=softmax,
        )[2]

    def function(cotangent: Any, h_NxD: jax.Array, w_VxD: jax.Array) -> Any:
        return logit_vjp(cotangent, h_NxD, w_VxD, chunk_bytes=_chunk_bytes(backend, rows, V, dtype), softmax=softmax)

    return function, (jax.eval_shape(cotangent_of, h, w, labels, weights), h, w)


def _chunk_bytes(backend: str, rows: int, V: int, dtype: str) -> int:
    itemsize = jnp.dtype(dtype).itemsize
    return rows * V * (itemsize if backend == "pallas" else 4 + itemsize)
