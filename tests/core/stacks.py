"""A stack of blocks with a norm and a head in both frameworks, and a method's gradient on it with all state given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from problems import B2, EPS, STEPS, Weights, adamw, as_torch, head, moments
from savings import momenta, remembered

from fsam_core import Blocks
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch

I, D, V, LAYERS = 6, 5, 9, 3  # noqa: E741
BLOCKS = Blocks(LAYERS, r"^block_(\d+)_", r"^final_norm$|^head$", r"^head$", r"norm")


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A stack of blocks x + tanh(x A) n, an input matrix below and a norm's scale and a head above."""
    random = np.random.default_rng(seed)
    found = {"embedding": random.normal(size=(I, D)), "final_norm": random.uniform(0.5, 1.5, D)}
    for i in range(LAYERS):
        found[f"block_{i}_a"] = random.normal(size=(D, D)) * 0.7
        found[f"block_{i}_norm"] = random.uniform(0.5, 1.5, D)
    return found | {"head": random.normal(size=(V, D))}


def prefix(p: Any, batch: dict, blocks: int) -> Any:
    x = batch["x"] @ p["embedding"]
    return through(p, x, range(blocks))


def suffix(p: Any, x: Any, batch: dict, blocks: int) -> Any:
    return head(through(p, x, range(blocks, LAYERS)) * p["final_norm"], p["head"], batch)


def through(p: Any, x: Any, which: range) -> Any:
    tanh = torch.tanh if isinstance(x, torch.Tensor) else jnp.tanh
    for i in which:
        x = x + tanh(x @ p[f"block_{i}_a"]) * p[f"block_{i}_norm"]
    return x


def model(p: Any, batch: dict) -> Any:
    return suffix(p, prefix(p, batch, 1), batch, 1)


def hidden(p: dict, batch: dict) -> tuple[Any, Any]:
    out = model(p, batch)
    return out.hidden, out.weight


def staged(framework: str, blocks: int) -> Any:
    kind = in_torch.Staged if framework == "torch" else in_jax.Staged
    return kind(lambda p, b: prefix(p, b, blocks), lambda p, x, b: suffix(p, x, b, blocks))


def got(framework: str, method: Any, batch: Any, *, clip_norm=None, features: Any = model) -> tuple[Any, dict]:
    """(Info, ĝ before clipping) with the momenta, second moments and previous gradient of the formulas."""
    values = weights()
    nu, mu, last = moments(values), momenta(values), remembered(values)
    if framework == "torch":
        net = Weights(values)
        optimizer = adamw(net, nu)
        for name, p in net.named_parameters():
            optimizer.state[p]["exp_avg"] = torch.from_numpy(mu[name])
        step = in_torch.Step(net, optimizer, method, features=features, clip_norm=clip_norm, blocks=BLOCKS)
        step.steps = STEPS
        step._corrections.previous = {p: torch.from_numpy(last[name]) for name, p in net.named_parameters()}
        step.gradient(as_torch(batch))
        back = max(1.0, step.info.grad_norm / clip_norm) if clip_norm else 1.0
        return step.info, {k: p.grad.numpy() * back for k, p in net.named_parameters()}
    grad = in_jax.value_and_grad(features, method, b2=B2, eps=EPS, clip_norm=clip_norm, blocks=BLOCKS)
    params, batch = jax.tree.map(jnp.asarray, (values, batch))
    state = optax.ScaleByAdamState(jnp.int32(STEPS), mu, nu)
    carry = in_jax.Carry(previous=jax.tree.map(jnp.asarray, last)) if method.direction.remembers else None
    (_, info), grads = grad(params, batch, state, carry)[:2]
    return info, {k: np.asarray(x) for k, x in grads.items()}
