"""Both backends behind one NumPy interface, each framework's plain same-dtype code, and how errors are compared."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import fsam_kernels.torch
import fsam_kernels.xla
from fsam_kernels import spec

BACKENDS = ("xla", "torch")
DTYPES = ("float32", "bfloat16", "float16")
OPS = {"xla": fsam_kernels.xla, "torch": fsam_kernels.torch}
# The package attribute of this name is the function; the module holds CHUNK_BYTES.
TORCH_MODULE = importlib.import_module("fsam_kernels.torch.linear_cross_entropy")


class Result(NamedTuple):
    """loss and lse, and (h̄, w̄) at the base head, at the moved head, and at the base head once more."""

    loss_N: Any
    lse_N: Any
    base: tuple[Any, Any]
    moved: tuple[Any, Any]
    again: tuple[Any, Any]


def to(backend: str, x: Any, dtype: str | None = None) -> Any:
    """A NumPy array as the backend's own."""
    if backend == "xla":
        return jnp.asarray(x, dtype)
    x = torch.from_numpy(np.array(x))
    return x if dtype is None else x.to(getattr(torch, dtype))


def back(x: Any) -> np.ndarray:
    """A backend's array in float64."""
    return (
        x.double().numpy()
        if isinstance(x, torch.Tensor)
        else np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64)
    )


def adam_of(backend: str, settings: dict | None, tensors: int) -> Any:
    """Adam's settings as the backend takes them: one for the whole tree in JAX, one for each tensor in PyTorch."""
    if settings is None:
        return None
    one = OPS[backend].Adam(**settings)
    return one if backend == "xla" else [one] * tensors


def rounded(dtype: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """The values that remain of `arrays` in `dtype`: what the oracle is given."""
    return [back(to("torch", x, dtype)) for x in arrays]


def head(backend: str, dtype: str, h, w, y, weights, moved) -> Result:
    """linear_cross_entropy, then logit_vjp three times."""
    ops = OPS[backend]
    h, w, weights, h2, w2 = (
        to(backend, x, kind)
        for x, kind in zip((h, w, weights, *moved), (dtype, dtype, "float32", dtype, dtype), strict=True)
    )
    loss, lse, cotangent, *_ = ops.linear_cross_entropy(h, w, to(backend, y), weights)
    vjp = lambda h, w: tuple(map(back, ops.logit_vjp(cotangent, h, w)))
    return Result(back(loss), back(lse), vjp(h, w), vjp(h2, w2), vjp(h, w))


def head_oracle(h, w, y, weights, moved) -> Result:
    """The same in float64."""
    loss, lse, zbar = spec.linear_cross_entropy(h, w, y, weights)
    base = spec.logit_vjp(zbar, h, w)
    return Result(loss, lse, base, spec.logit_vjp(zbar, *moved), base)


def head_plain(backend: str, dtype: str, h, w, y, weights, moved) -> Result:
    """What one writes without this package: logits, log_softmax and autodiff, all in `dtype`."""
    return (_plain_jax if backend == "xla" else _plain_torch)(dtype, h, w, y, weights, moved)


def _plain_jax(dtype, h, w, y, weights, moved) -> Result:
    h, w, weights, h2, w2 = (jnp.asarray(x, dtype) for x in (h, w, weights, *moved))
    safe, seen = jnp.maximum(y, 0), jnp.asarray(y) >= 0

    def loss_of(z):
        logp = jax.nn.log_softmax(z)
        return jnp.where(seen, -jnp.take_along_axis(logp, safe[:, None], 1)[:, 0], 0)

    z = h @ w.T
    zbar = jax.grad(lambda z: jnp.sum(loss_of(z) * weights))(z)
    pull = lambda h, w: tuple(map(back, (zbar @ w, zbar.T @ h)))
    return Result(back(loss_of(z)), back(jax.nn.logsumexp(z, axis=1)), pull(h, w), pull(h2, w2), pull(h, w))


def _plain_torch(dtype, h, w, y, weights, moved) -> Result:
    h, w, weights, h2, w2 = (to("torch", x, dtype) for x in (h, w, weights, *moved))
    y = torch.from_numpy(np.array(y))
    z = (h @ w.T).requires_grad_()
    loss = F.nll_loss(F.log_softmax(z, 1), y.where(y >= 0, -100), reduction="none", ignore_index=-100)
    (zbar,) = torch.autograd.grad((loss * weights).sum(), z)
    z = z.detach()
    pull = lambda h, w: tuple(map(back, (zbar @ w, zbar.T @ h)))
    return Result(back(loss.detach()), back(z.logsumexp(1)), pull(h, w), pull(h2, w2), pull(h, w))


def assert_as_good(got: Any, plain: Any, oracle: Any, dtype: str, k: float = 3.0) -> None:
    """‖got − oracle‖ ≤ k (‖plain − oracle‖ + one rounding of the oracle), in the 2-norm; no absolute tolerance."""
    assert got.shape == oracle.shape
    assert np.isfinite(got).all()
    one_rounding = torch.finfo(getattr(torch, dtype)).eps / 2 * np.linalg.norm(oracle)
    error, allowed = np.linalg.norm(got - oracle), k * (np.linalg.norm(plain - oracle) + one_rounding)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, of {np.linalg.norm(oracle):.3e}"
