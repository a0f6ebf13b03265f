"""The whole step on the Triton and Pallas backends, in their interpreters, against the plain backend's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    B2,
    EPS,
    METHODS,
    Weights,
    adam_state,
    adamw,
    as_given,
    as_torch,
    batch_of,
    distance,
    mlp,
    moments,
    values,
)

from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import Memory

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # the Triton interpreter's, where infinities are meant
V = 150


def gradient(backend: str, method, memory: Memory) -> dict[str, np.ndarray]:
    weights = values(v=V, dtype="float32")
    batches = [batch_of(10, seed=seed, v=V, dtype="float32") for seed in (1, 2)]
    nu = moments(weights)
    if backend in ("torch", "triton"):
        model = Weights(weights)
        step = in_torch.Step(model, adamw(model, nu), method, features=mlp, memory=memory, backend=backend)
        step.gradient(as_torch(batches))
        return {k: p.grad.numpy() for k, p in model.named_parameters()}
    call = in_jax.value_and_grad(mlp, method, b2=B2, eps=EPS, memory=memory, backend=backend)
    weights, batches, nu = jax.tree.map(jnp.asarray, (weights, as_given(batches), nu))
    return {k: np.asarray(x) for k, x in call(weights, batches, adam_state(weights, nu))[1].items()}


# The TPU interpreter takes seconds for each program.
CASES = [
    ("torch", "triton", "precond-functional", "keep"),
    ("torch", "triton", "logit", "recompute"),
    ("xla", "pallas", "precond-functional", "recompute"),
    pytest.param("xla", "pallas", "precond-functional", "keep", marks=pytest.mark.slow),
    pytest.param("xla", "pallas", "logit", "keep", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("plain", "special", "name", "cotangent"), CASES)
def test_gradient_is_that_of_the_plain_backend(plain, special, name, cotangent):
    memory = Memory(cotangent, chunk_bytes=6 * V * 8)
    got, expected = (gradient(backend, METHODS[name], memory) for backend in (special, plain))
    assert distance(got, expected) < 2e-6
