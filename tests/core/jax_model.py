"""A small tanh network in float32 with its batch, for the tests of the JAX step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from problems import batch_of, values

from fsam_core.jax import LinearHead

RHO = 0.3


def params() -> dict:
    return jax.tree.map(jnp.asarray, values(dtype="float32"))


def arrays(seed: int = 1, n: int = 12) -> tuple:
    b = batch_of(n, seed, dtype="float32")
    return jnp.asarray(b["x"]), jnp.asarray(b["y"])


def head_of(p, x, y):
    return LinearHead(jnp.tanh(x @ p["a"]), p["w"], y)


def features(p, b):
    return head_of(p, *b)
