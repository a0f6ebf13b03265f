"""Functional-SAM in a hand-written JAX training loop: a character model of this file, in a few seconds."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import fsam_core.jax as fsam

CONTEXT, WIDTH, VOCABULARY = 8, 64, 256
text = jnp.frombuffer(Path(__file__).read_bytes(), jnp.uint8).astype(jnp.int32)


def features(params, batch):
    """The last CONTEXT characters, embedded and mixed, as hidden states for the next one."""
    x = params["embedding"][batch["inputs"]].reshape(len(batch["inputs"]), -1)
    h = jax.nn.gelu(x @ params["mix"])
    return fsam.LinearHead(h, params["head"], batch["labels"])


def initial(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "embedding": 0.3 * jax.random.normal(a, (VOCABULARY, WIDTH)),
        "mix": jax.random.normal(b, (CONTEXT * WIDTH, WIDTH)) / (CONTEXT * WIDTH) ** 0.5,
        "head": 0.1 * jax.random.normal(c, (VOCABULARY, WIDTH)),
    }


def draw(key, size=64):
    start = jax.random.randint(key, (size,), 0, len(text) - CONTEXT)
    window = text[start[:, None] + jnp.arange(CONTEXT + 1)]
    return {"inputs": window[:, :-1], "labels": window[:, -1]}


method = fsam.FunctionalSAM(rho=0.1, precondition="adam")
tx = fsam.skip_nonfinite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95)))
grad = fsam.value_and_grad(features, method, b2=0.95, clip_norm=1.0)


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, batch):
    (_, info), grads = grad(params, batch, opt_state)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, info


params = initial(jax.random.key(0))
opt_state = tx.init(params)
for i in range(300):
    params, opt_state, info = step(params, opt_state, draw(jax.random.fold_in(jax.random.key(1), i)))
    if i % 50 == 0 or i == 299:
        print(f"step {i:3d}  loss {info.loss:.3f}  |g| {info.grad_norm:.3f}  |ε| {info.perturbation_norm:.3f}")
