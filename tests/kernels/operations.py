"""Both backends behind one NumPy interface, each framework's plain same-dtype code, and how errors are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import fsam_kernels.torch
import fsam_kernels.xla
from fsam_kernels import spec
from fsam_kernels.options import CROSS_ENTROPY, Loss

BACKENDS = ("xla", "torch")
DTYPES = ("float32", "bfloat16", "float16")
OPS = {"xla": fsam_kernels.xla, "torch": fsam_kernels.torch}


class Problem(NamedTuple):
    """A head, a moved head for the second VJP, and a loss. Arrays are NumPy's, in float64."""

    h: Any
    w: Any
    y: Any
    weights: Any
    moved: tuple[Any, Any]
    bias: Any = None
    moved_bias: Any = None
    loss: Loss = CROSS_ENTROPY


class Result(NamedTuple):
    """loss and lse, and (h̄, w̄[, b̄]) formed with the loss, at the moved head, and at the base head once more."""

    loss_N: Any
    lse_N: Any
    base: tuple[Any, ...]
    moved: tuple[Any, ...]
    again: tuple[Any, ...]


def to(backend: str, x: Any, dtype: str | None = None) -> Any:
    """A NumPy array as the backend's own."""
    if backend in ("xla", "pallas"):
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


def head(backend: str, dtype: str, problem: Problem, *, keep: bool = False, chunk_bytes: int | None = None) -> Result:
    """linear_cross_entropy with its gradient, then logit_vjp at the moved head and at the base head."""
    ops, p = OPS[backend], problem
    give = lambda x: None if x is None else to(backend, x, dtype)
    h, w, bias = give(p.h), give(p.w), give(p.bias)
    loss, lse, cotangent, gradients = ops.linear_cross_entropy(
        h,
        w,
        to(backend, p.y),
        to(backend, p.weights, "float32" if dtype != "float64" else dtype),
        bias_V=bias,
        loss=p.loss,
        gradient=True,
        keep=keep,
        chunk_bytes=chunk_bytes,
    )
    present = lambda gradients: tuple(back(x) for x in gradients if x is not None)
    vjp = lambda h, w, b: present(ops.logit_vjp(cotangent, h, w, bias_V=b, chunk_bytes=chunk_bytes))
    moved = vjp(*map(give, p.moved), give(p.moved_bias))
    return Result(back(loss), back(lse), present(gradients), moved, vjp(h, w, bias))


def head_oracle(problem: Problem) -> Result:
    """The same in float64."""
    p = problem
    loss, lse, zbar = spec.linear_cross_entropy(p.h, p.w, p.y, p.weights, bias_V=p.bias, loss=p.loss)
    vjp = lambda h, w, b: spec.logit_vjp(zbar, h, w, bias_V=b, soft_cap=p.loss.soft_cap)[: 2 if b is None else 3]
    base = vjp(p.h, p.w, p.bias)
    return Result(loss, lse, base, vjp(*p.moved, p.moved_bias), base)


def head_terms(problem: Problem) -> Result:
    """What bounds the terms that each output is a sum of. In a head of few rows, features and words they may cancel to
    less than the rounding of one, which plain code is then within by luck.
    """
    p = problem
    z = spec.capped(spec.logits(p.h, p.w, p.bias), p.loss.soft_cap)
    _, lse, _ = spec.linear_cross_entropy(p.h, p.w, p.y, bias_V=p.bias, loss=p.loss)
    lse_N = np.abs(z).max(axis=1) + np.log(z.shape[1])
    loss_N = np.where(p.y >= 0, 2 * lse_N + p.loss.z_loss * lse**2, 0)
    zbar_Nx1 = (np.where(p.y >= 0, p.weights, 0) * (1 + 2 * p.loss.z_loss * np.abs(lse)))[:, None]
    zbar_NxV = np.broadcast_to(zbar_Nx1, z.shape)
    vjp = lambda h, w, b: spec.logit_vjp(zbar_NxV, np.abs(h), np.abs(w), bias_V=b)[: 2 if b is None else 3]
    base = vjp(p.h, p.w, p.bias)
    return Result(loss_N, lse_N, base, vjp(*p.moved, p.moved_bias), base)


def head_plain(backend: str, dtype: str, problem: Problem) -> Result:
    """What one writes without this package: logits, log_softmax and autodiff, all in `dtype`."""
    return (_plain_torch if backend in ("torch", "triton") else _plain_jax)(dtype, problem)


def _plain_jax(dtype: str, p: Problem) -> Result:
    h, w, weights, h2, w2 = (jnp.asarray(x, dtype) for x in (p.h, p.w, p.weights, *p.moved))
    b, b2 = (None if x is None else jnp.asarray(x, dtype) for x in (p.bias, p.moved_bias))
    safe, seen, o = jnp.maximum(p.y, 0), jnp.asarray(p.y) >= 0, p.loss

    def logits(h, w, b):
        u = h @ w.T if b is None else h @ w.T + b
        return u if o.soft_cap is None else o.soft_cap * jnp.tanh(u / o.soft_cap)

    def loss_of(z):
        logp, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, axis=1)
        target = -jnp.take_along_axis(logp, safe[:, None], 1)[:, 0]
        smooth = (1 - o.label_smoothing) * target - o.label_smoothing * logp.mean(axis=1)
        return jnp.where(seen, smooth + o.z_loss * lse**2 if o.z_loss else smooth, 0)

    z = logits(h, w, b)
    zbar = jax.grad(lambda z: jnp.sum(loss_of(z) * weights))(z)

    def pull(*head):
        given = [x for x in head if x is not None]
        return tuple(map(back, jax.vjp(lambda *x: logits(*x, *head[len(x) :]), *given)[1](zbar)))

    base = pull(h, w, b)
    return Result(back(loss_of(z)), back(jax.nn.logsumexp(z, axis=1)), base, pull(h2, w2, b2), base)


def _plain_torch(dtype: str, p: Problem) -> Result:
    h, w, weights, h2, w2 = (to("torch", x, dtype) for x in (p.h, p.w, p.weights, *p.moved))
    b, b2 = (None if x is None else to("torch", x, dtype) for x in (p.bias, p.moved_bias))
    y, o = torch.from_numpy(np.array(p.y)), p.loss

    def logits(h, w, b):
        u = F.linear(h, w, b)
        return u if o.soft_cap is None else o.soft_cap * torch.tanh(u / o.soft_cap)

    z = logits(h, w, b).detach().requires_grad_()
    y, options = y.where(y >= 0, -100), {"reduction": "none", "ignore_index": -100}
    loss = F.cross_entropy(z, y, label_smoothing=o.label_smoothing, **options)
    if o.z_loss:
        loss = loss + torch.where(y >= 0, o.z_loss * z.logsumexp(1) ** 2, 0)
    (zbar,) = torch.autograd.grad((loss * weights).sum(), z)

    def pull(*head):
        leaves = [x.detach().requires_grad_() for x in head if x is not None]
        return tuple(map(back, torch.autograd.grad(logits(*leaves, *head[len(leaves) :]), leaves, zbar)))

    base = pull(h, w, b)
    return Result(back(loss.detach()), back(z.detach().logsumexp(1)), base, pull(h2, w2, b2), base)


def assert_all_as_good(
    backend: str, dtype: str, problem: Problem, *, k: float = 3.0, by_terms: bool = False, **options: Any
) -> None:
    """Every output of `head` within k times the error of plain code. See `assert_as_good`."""
    got, plain, oracle = (
        head(backend, dtype, problem, **options),
        head_plain(backend, dtype, problem),
        head_oracle(problem),
    )
    terms = head_terms(problem) if by_terms else oracle
    for name in ("loss_N", "lse_N"):
        assert_as_good(*(getattr(x, name) for x in (got, plain, oracle)), dtype, k, terms=getattr(terms, name))
    for name in ("base", "moved", "again"):
        for x, p, o, t in zip(*(getattr(x, name) for x in (got, plain, oracle, terms)), strict=True):
            assert_as_good(x, p, o, dtype, k, terms=t)


def assert_as_good(got: Any, plain: Any, oracle: Any, dtype: str, k: float = 3.0, *, terms: Any = None) -> None:
    """‖got − oracle‖ ≤ k (‖plain − oracle‖ + one rounding of the oracle), in the 2-norm; no absolute tolerance.

    With `terms` (same shape) it is one rounding of these.
    """
    assert got.shape == oracle.shape
    assert np.isfinite(got).all()
    one_rounding = torch.finfo(getattr(torch, dtype)).eps / 2 * np.linalg.norm(oracle if terms is None else terms)
    error, allowed = np.linalg.norm(got - oracle), k * (np.linalg.norm(plain - oracle) + one_rounding)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, of {np.linalg.norm(oracle):.3e}"


def zbar(backend: str, p: Problem) -> np.ndarray:
    """The logit cotangent itself: contracted with an identity, h̄ = z̄ I."""
    give = lambda x: to(backend, x, "float32")
    cotangent = OPS[backend].linear_cross_entropy(give(p.h), give(p.w), to(backend, p.y), give(p.weights), loss=p.loss)[
        2
    ]
    zeros, eye = np.zeros((len(p.h), len(p.w))), np.eye(len(p.w))
    return back(OPS[backend].logit_vjp(cotangent, give(zeros), give(eye))[0])
