"""Products and look-ups in half floats whose weights' gradients are float32 from the product on.

A model that is cast as a whole has gradients that are rounded to its dtype first and then, on a mesh, summed in it over
the devices. Here a weight stays in float32 and is cast inside: what is gathered is narrow, what is reduced is wide.

In one dtype on one device the code is plain, and JAX differentiates it in both modes (`jax.jvp`, `jax.hessian`). The
rules for half floats and for a mesh are for reverse mode, and for forward over reverse.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fsam_trainers.jax.mesh import in_use


def product(name: str, x_NxI: jax.Array, w: jax.Array) -> jax.Array:
    """x times the parameter of this name, as the model uses it (`mesh.in_use`), in the dtype of x.

    Args:
        name: the parameter's.
        x_NxI: activations.
        w: [I, ...] float32 or as wide as x; its gradient is summed, and comes back, in its own dtype.
    """
    if _is_plain(w, x_NxI.dtype):
        # As one matrix: XLA then transposes as little for the gradient of qkv as the rule below.
        used = in_use(name, w)
        return (x_NxI @ used.reshape(len(used), -1)).reshape(-1, *used.shape[1:])
    return _mixed_product(name, x_NxI, w)


def _is_plain(w: jax.Array, dtype: Any) -> bool:
    return bool(w.dtype == dtype) and jax.sharding.get_abstract_mesh().size <= 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_product(name: str, x_NxI: jax.Array, w: jax.Array) -> jax.Array:
    return _product_forward(name, x_NxI, w)[0]


def _product_forward(name: str, x_NxI: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    # The rounded array is kept: recomputing it in the backward pass would gather it again.
    used = in_use(name, w.astype(x_NxI.dtype))
    return jnp.tensordot(x_NxI, used, 1), (x_NxI, used, w)


def _product_backward(name: str, kept: Any, ybar: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NxI, used, w = kept
    of_all = tuple(range(1, ybar.ndim))
    _, as_stored = jax.vjp(partial(in_use, name), w)
    (wbar,) = as_stored(_over_rows(x_NxI, ybar, w.dtype))
    return jnp.tensordot(ybar, used, (of_all, of_all)), wbar


def _over_rows(x_NxI: jax.Array, ybar: jax.Array, dtype: Any) -> jax.Array:
    """Σ_n x_n ȳ_n, [I, ...], summed in `dtype`."""
    dot = partial(jnp.tensordot, axes=((0,), (0,)), preferred_element_type=dtype)
    if ybar.ndim == 2 or x_NxI.dtype == dtype:
        return dot(x_NxI, ybar)
    # One product for each: XLA's CPU runtime has no such half-float product with three axes (jaxlib 0.10.2), and
    # merging two axes would exchange their shards.
    return jnp.stack([dot(x_NxI, ybar[:, i]) for i in range(ybar.shape[1])], 1)


_mixed_product.defvjp(_product_forward, _product_backward)


def rows_of(name: str, w_VxD: jax.Array, index_N: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the parameter of this name in `dtype`, [N, D]; its gradient is summed in its own dtype."""
    return (_rows if _is_plain(w_VxD, dtype) else _mixed_rows)(name, w_VxD, index_N, dtype)


def _rows(name: str, w_VxD: jax.Array, index_N: jax.Array, dtype: Any) -> jax.Array:
    return in_use(name, w_VxD.astype(dtype))[index_N]


_mixed_rows = jax.custom_vjp(_rows, nondiff_argnums=(0, 3))


def _rows_forward(name: str, w_VxD: jax.Array, index_N: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    return _rows(name, w_VxD, index_N, dtype), (w_VxD, index_N)


def _rows_backward(name: str, dtype: Any, kept: Any, xbar_NxD: jax.Array) -> tuple[jax.Array, None]:
    w_VxD, index_N = kept
    _, scattered = jax.vjp(lambda w_VxD: in_use(name, w_VxD)[index_N], w_VxD)
    return scattered(xbar_NxD.astype(w_VxD.dtype))[0], None


_mixed_rows.defvjp(_rows_forward, _rows_backward)
