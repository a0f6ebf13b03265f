"""Functional-SAM in JAX on a mesh: batches sharded over "data", the vocabulary over "tensor"; four virtual devices."""

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # on a real machine: leave it out

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fsam_core.jax as fsam

CONTEXT, WIDTH, VOCABULARY, BATCH = 8, 64, 256, 64
text = jnp.frombuffer(Path(jax.__file__).read_bytes(), jnp.uint8).astype(jnp.int32)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def features(params, batch):
    """The last CONTEXT characters, embedded and mixed, as hidden states for the next one."""
    x = params["embedding"][batch["inputs"]].reshape(len(batch["inputs"]), -1)
    return fsam.LinearHead(jax.nn.gelu(x @ params["mix"]), params["head"], batch["labels"])


def initial(key):
    a, b, c = jax.random.split(key, 3)
    params = {
        "embedding": 0.3 * jax.random.normal(a, (VOCABULARY, WIDTH)),
        "mix": jax.random.normal(b, (CONTEXT * WIDTH, WIDTH)) / (CONTEXT * WIDTH) ** 0.5,
        "head": 0.1 * jax.random.normal(c, (VOCABULARY, WIDTH)),
    }
    specs = {"embedding": P(), "mix": P(None, "tensor"), "head": P("tensor", None)}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in params.items()}


def draw(key):
    start = jax.random.randint(key, (BATCH,), 0, len(text) - CONTEXT)
    window = text[start[:, None] + jnp.arange(CONTEXT + 1)]
    return jax.device_put({"inputs": window[:, :-1], "labels": window[:, -1]}, NamedSharding(mesh, P("data")))


method = fsam.FunctionalSAM(rho=0.1, precondition="adam")
tx = fsam.skip_nonfinite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95)))
# row_axes: each device counts the chunks of the head over its own tokens.
grad = fsam.value_and_grad(features, method, b2=0.95, clip_norm=1.0, memory=fsam.Memory(row_axes=("data",)))


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, batch):
    (_, info), grads = grad(params, batch, opt_state)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, info


with jax.set_mesh(mesh):
    params = initial(jax.random.key(0))
    opt_state = tx.init(params)  # sharded as the weights are
    for i in range(200):
        params, opt_state, info = step(params, opt_state, draw(jax.random.fold_in(jax.random.key(1), i)))
        if i % 50 == 0 or i == 199:
            print(f"step {i:3d}  loss {info.loss:.3f}  |ε| {info.perturbation_norm:.3f}")
print(f"the head lies on {len(params['head'].sharding.device_set)} devices as {params['head'].sharding.spec}")
