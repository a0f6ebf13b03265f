"""`head_curvature`: the oracle compared with dense autodiff, and both backends with the oracle."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from losses import LOSSES
from operations import BACKENDS, back, to
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_kernels import spec
from fsam_kernels.options import Loss

N, D, V = 13, 5, 11


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(scale: float = 1.0, bias: bool = True) -> dict[str, Any]:
    random = np.random.default_rng(3)
    draw = lambda *shape: random.normal(size=shape)
    found = {
        "h_NxD": scale * draw(N, D),
        "w_VxD": draw(V, D),
        "labels_N": np.where(random.random(N) < 0.2, -1, random.integers(0, V, N)),
        "weights_N": random.uniform(0.5, 2, N) / N,
        "hdot_NxD": draw(N, D),
        "wdot_VxD": draw(V, D),
    }
    return found | ({"bias_V": draw(V), "bias_dot_V": draw(V)} if bias else {})


def dense(given: dict[str, Any], loss: Loss) -> tuple[Any, Any, Any]:
    """(gradient, Gauss–Newton part, functional part) at (h, w, b), by autodiff of the whole logits."""
    p = {k: jnp.asarray(x) for k, x in given.items()}
    y, seen = jnp.maximum(p["labels_N"], 0), p["labels_N"] >= 0

    def z_of(h, w, b):
        u = h @ w.T + b
        return u if loss.soft_cap is None else loss.soft_cap * jnp.tanh(u / loss.soft_cap)

    def total(z):
        logp, lse, s = jax.nn.log_softmax(z), jax.nn.logsumexp(z, axis=1), loss.label_smoothing
        each = -(1 - s) * logp[jnp.arange(N), y] - s * logp.mean(axis=1) + loss.z_loss * lse**2
        return jnp.sum(jnp.where(seen, each, 0) * p["weights_N"])

    zero = jnp.zeros(V)
    at = p["h_NxD"], p["w_VxD"], p.get("bias_V", zero)
    along = p["hdot_NxD"], p["wdot_VxD"], p.get("bias_dot_V", zero)
    z, zdot = jax.jvp(z_of, at, along)
    zbar, q = jax.jvp(jax.grad(total), (z,), (zdot,))
    pulled = lambda *x: jax.vjp(z_of, *x)[1](zbar)
    return pulled(*at), jax.vjp(z_of, *at)[1](q), jax.jvp(pulled, at, along)[1]


def backend_of(name: str) -> Any:
    return importlib.import_module(f"fsam_kernels.{name}.head_curvature").head_curvature


def run(backend: str, given: dict[str, Any], **options: Any) -> Any:
    given = {k: to(backend, x) for k, x in given.items()}
    bias = {k: given.pop(k) for k in ("bias_V", "bias_dot_V") if k in given}
    return backend_of(backend)(*given.values(), **bias, **options)


def error(got: Any, want: Any) -> float:
    """The largest relative error of h̄, w̄ and b̄."""
    pairs = [(back(x), np.asarray(y)) for x, y in zip(got, want, strict=True) if x is not None]
    return max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs if np.any(y) or np.any(x))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_oracle_is_the_derivative_of_dense_autodiff(loss):
    given = problem()
    for got, want in zip(spec.head_curvature(**given, loss=loss), dense(given, loss)[1:], strict=True):
        for x, y in zip(got, want, strict=True):
            assert np.linalg.norm(x - y) <= 1e-12 * np.linalg.norm(y)


@pytest.mark.parametrize("chunk_bytes", [None, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_oracle(backend, loss, bias, chunk_bytes):
    given = problem(bias=bias)
    found = run(backend, given, loss=loss, chunk_bytes=chunk_bytes)
    gauss_newton, functional = spec.head_curvature(**given, loss=loss)
    assert error(found.gradient, dense(given, loss)[0]) < 1e-12
    assert error(found.gauss_newton, gauss_newton) < 1e-12
    assert error(found.functional, functional) < 1e-12
    assert (found.functional.bbar_V is None) == (not bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_its_cross_term_is_noticed(backend):
    given = problem()
    _, functional = spec.head_curvature(**given)
    half = {**given, "wdot_VxD": np.zeros((V, D))}
    assert error(run(backend, half).functional, functional) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_keep_their_digits(backend):
    """p → 1: the Gauss–Newton part is of the size of 1 − p, and its error relative to that is of rounding."""
    given = problem(scale=12.0)
    small = {k: x.astype(np.float32) if x.dtype == np.float64 else x for k, x in given.items()}
    rounded = {k: x.astype(np.float64) if x.dtype == np.float32 else x for k, x in small.items()}
    want, _ = spec.head_curvature(**rounded)
    found = run(backend, small).gauss_newton
    z = spec.logits(rounded["h_NxD"], rounded["w_VxD"], rounded["bias_V"])
    confident = np.exp(z - z.max(1, keepdims=True)).sum(1) - 1 < 1e-6
    confident &= given["labels_N"] >= 0
    assert confident.any()
    got, exact = back(found.hbar_NxD)[confident], want[0][confident]
    assert np.linalg.norm(got - exact, axis=1).max() > 0  # float32 rounds
    assert (np.linalg.norm(got - exact, axis=1) <= 1e-4 * np.linalg.norm(exact, axis=1)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_sums_in_float32(backend, dtype):
    given = problem()
    names = [name for name in given if name not in ("labels_N", "weights_N")]
    narrow = given | {name: back(to(backend, given[name], dtype)) for name in names}
    want = spec.head_curvature(**narrow, loss=LOSSES["all"])
    arrays = {k: to(backend, x, dtype if k in names else None) for k, x in narrow.items()}
    bias = {k: arrays.pop(k) for k in ("bias_V", "bias_dot_V")}
    found = backend_of(backend)(*arrays.values(), **bias, loss=LOSSES["all"], chunk_bytes=2000)
    for got, expected in zip(found[1:], want, strict=True):
        assert {str(x.dtype).removeprefix("torch.") for x in got} == {dtype}
        assert error(got, expected) < (2e-2 if dtype == "bfloat16" else 3e-3)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in jax.tree.leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_array_has_n_times_v_elements():
    given, loss = problem(), LOSSES["all"]
    with Largest() as largest:
        run("torch", given, loss=loss, chunk_bytes=600)
    assert largest.numel < N * V
    arrays = [jnp.asarray(x) for x in given.values()]
    names = list(given)
    call = lambda *x: backend_of("xla")(**dict(zip(names, x, strict=True)), loss=loss, chunk_bytes=600)
    assert max(_sizes(jax.make_jaxpr(call)(*arrays).jaxpr)) < N * V
    whole = lambda *x: backend_of("xla")(**dict(zip(names, x, strict=True)), loss=loss)
    assert max(_sizes(jax.make_jaxpr(whole)(*arrays).jaxpr)) >= N * V


def _sizes(jaxpr: Any) -> list[int]:
    found = [int(np.prod(v.aval.shape)) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _sizes(inner)
    return found
