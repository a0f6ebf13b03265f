"""A small model that runs in both frameworks, one call for the gradient of either, and the textbook listings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import nn

from fsam_core import SAM, FunctionalSAM, LogitSAM, Method, MicroBatches, Plain
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import AUTO, Memory

FRAMEWORKS = ("jax", "torch")
METHODS = {
    "adamw": Plain(),
    "sam": SAM(0.3),
    "functional": FunctionalSAM(0.3),
    "logit": LogitSAM(0.3),
    "precond-functional": FunctionalSAM(0.3, precondition="adam"),
    "precond-sam-dual-previous": SAM(0.1, precondition="adam", norm="dual", second_moment="previous"),
}
B2, EPS, STEPS = 0.95, 1e-8, 3  # Adam's settings, and the steps its artificial state has seen


class Weights(nn.Module):
    """Named parameters, read as `weights["a"]` as from the dict that JAX takes."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(np.array(value))))

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)


def head(h: Any, w: Any, batch: dict) -> Any:
    """The framework's LinearHead."""
    kind = in_torch.LinearHead if isinstance(h, torch.Tensor) else in_jax.LinearHead
    return kind(h, w, batch["y"], batch.get("weights"))


def mlp(p: Any, batch: dict) -> Any:
    """tanh(x A) and a head W: nonlinear in θ."""
    z = batch["x"] @ p["a"]
    return head(torch.tanh(z) if isinstance(z, torch.Tensor) else jnp.tanh(z), p["w"], batch)


def linear(p: Any, batch: dict) -> Any:
    """A head alone: logits linear in θ."""
    return head(batch["x"], p["w"], batch)


def mlp_logits(p: Any, batch: dict) -> Any:
    """`mlp` with its logits and its own loss."""
    return logits_of(mlp(p, batch))


def logits_of(head: Any) -> Any:
    """A plain LinearHead as Logits, whose loss is 0 where every label is ignored."""
    z, y, weights = head.hidden @ head.weight.T, head.labels.reshape(-1), head.token_weights
    torchy = isinstance(z, torch.Tensor)
    seen = (y >= 0) * (1 if weights is None else weights.reshape(-1))
    total = seen.sum()

    def loss(z: Any) -> Any:
        z = z.reshape(-1, z.shape[-1])
        logp = F.log_softmax(z, 1) if torchy else jax.nn.log_softmax(z)
        nll = -logp[(torch if torchy else jnp).arange(len(y)), y]
        return (nll * seen).sum() / (total + (total == 0))

    return (in_torch if torchy else in_jax).Logits(z, loss, total)


def values(seed: int = 0, i: int = 6, d: int = 5, v: int = 9, dtype: str = "float64") -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"a": random.normal(size=(i, d)).astype(dtype), "w": random.normal(size=(v, d)).astype(dtype)}


def batch_of(n: int = 12, seed: int = 1, i: int = 6, v: int = 9, ignored: float = 0.2, dtype: str = "float64") -> dict:
    random = np.random.default_rng(seed)
    y = np.where(random.random(n) < ignored, -1, random.integers(0, v, n))
    return {"x": random.normal(size=(n, i)).astype(dtype), "y": y}


def joined(batches: list[dict]) -> dict:
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def moments(weights: dict, seed: int = 5) -> dict[str, np.ndarray]:
    """A second moment of the size of a gradient's square."""
    random = np.random.default_rng(seed)
    return {k: random.uniform(0.1, 1, x.shape).astype(x.dtype) * 1e-3 for k, x in weights.items()}


def as_given(batch: Any) -> Any:
    """What a step is given: in these tests a list holds micro-batches."""
    return MicroBatches(batch) if isinstance(batch, list) else batch


def as_torch(x: Any) -> Any:
    x = as_given(x)
    if isinstance(x, MicroBatches):
        return MicroBatches(map(as_torch, x))
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), x)


def float32(seed: int = 0) -> dict:
    return values(seed, dtype="float32")


def float32_batch(seed: int = 1, n: int = 12) -> dict:
    return as_torch(batch_of(n, seed, dtype="float32"))


def adam_state(weights: dict, nu: dict) -> optax.ScaleByAdamState:
    return optax.ScaleByAdamState(jnp.int32(STEPS), jax.tree.map(jnp.zeros_like, weights), nu)


def adamw(model: nn.Module, nu: dict | None = None, **options: Any) -> torch.optim.AdamW:
    """AdamW with the second moments `nu` after STEPS steps, or a fresh one."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, B2), eps=EPS, **options)
    for name, p in model.named_parameters() if nu is not None else ():
        exp_avg_sq = torch.from_numpy(np.array(nu[name]))
        optimizer.state[p] = {
            "step": torch.tensor(float(STEPS)),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": exp_avg_sq,
        }
    return optimizer


def gradient(
    framework: str,
    features: Any,
    method: Method,
    weights: dict,
    batch: Any,
    *,
    clip_norm: float | None = None,
    jit: bool = False,
    memory: Memory = AUTO,
) -> tuple[float, Any, dict[str, np.ndarray]]:
    """(loss, Info, ĝ unclipped) as NumPy; the second moments are `moments(weights)`."""
    nu = moments(weights)
    if framework == "torch":
        model = Weights(weights)
        step = in_torch.Step(model, adamw(model, nu), method, features=features, clip_norm=clip_norm, memory=memory)
        loss = step.gradient(as_torch(batch))
        grads = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
        return float(loss), step.info, grads
    call = in_jax.value_and_grad(features, method, b2=B2, eps=EPS, clip_norm=clip_norm, memory=memory)
    weights, batch, nu = jax.tree.map(jnp.asarray, (weights, as_given(batch), nu))
    (loss, info), grads = (jax.jit(call) if jit else call)(weights, batch, adam_state(weights, nu))
    return float(loss), info, {k: np.asarray(x) for k, x in grads.items()}


def flat(grads: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(grads[k]) for k in sorted(grads)])


def distance(a: dict, b: dict) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b)))


# --- the textbook: full logits, two backward passes, the perturbation written out -------------------------------------


def textbook_jax(features, params, batch, method, nu=None, steps=0, b2=B2, eps=EPS, clip_norm=None) -> Any:
    y = features(params, batch).labels.reshape(-1)
    z_of = lambda p: (lambda out: out.hidden.reshape(len(y), -1) @ out.weight.T)(features(p, batch))
    nll = lambda z: jnp.where(y >= 0, -jax.nn.log_softmax(z)[jnp.arange(len(y)), y], 0)
    loss = lambda z: jnp.sum(nll(z)) / jnp.sum(y >= 0)
    pulled = lambda p, zbar: jax.grad(lambda p: jnp.sum(z_of(p) * zbar))(p)

    g = jax.grad(lambda p: loss(z_of(p)))(params)
    if isinstance(method, Plain):
        return g
    c = 1 if clip_norm is None else jnp.minimum(1, clip_norm / optax.tree.norm(g))
    d = cg = jax.tree.map(lambda x: c * x, g)
    if method.precondition:
        t = steps + (method.second_moment == "current")
        if method.second_moment == "current":
            nu = jax.tree.map(lambda v, x: b2 * v + (1 - b2) * x**2, nu, cg)
        d = jax.tree.map(lambda x, v: x / (jnp.sqrt(v / (1 - b2**t)) + eps), cg, nu)
    dot = lambda a, b: sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    square = dot(d, d) if method.norm == "l2" else dot(cg, d)
    moved = jax.tree.map(lambda p, x: p + method.rho / jnp.sqrt(square) * x, params, d)
    if method.path == "sam":
        return jax.grad(lambda p: loss(z_of(p)))(moved)
    seen_at, jacobian_at = (params, moved) if method.path == "functional" else (moved, params)
    return pulled(jacobian_at, jax.grad(loss)(z_of(seen_at)))


def textbook_torch(features, model, batch, method, optimizer, clip_norm=None) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    at = lambda p: (
        lambda: torch.func.functional_call(_Call(model, features), {f"model.{k}": x for k, x in p.items()}, batch)
    )
    labels = features(model, batch).labels.reshape(-1)
    z_of = lambda p: (lambda out: out.hidden.reshape(len(labels), -1) @ out.weight.T)(at(p)())
    loss = lambda z: F.cross_entropy(z, labels, ignore_index=-1)
    leaves = lambda p: {k: x.detach().clone().requires_grad_() for k, x in p.items()}

    def backward(p, scalar):
        p = leaves(p)
        return dict(zip(p, torch.autograd.grad(scalar(z_of(p)), list(p.values())), strict=True))

    g = backward(params, loss)
    if isinstance(method, Plain):
        return g
    total = torch.stack([x.norm() for x in g.values()]).norm()
    c = 1.0 if clip_norm is None else min(1.0, float(clip_norm / total))
    d = {}
    for k, p in params.items():
        d[k] = c * g[k]
        if method.precondition:
            group, state = optimizer.param_groups[0], optimizer.state[p]
            b2, t, v = group["betas"][1], int(state["step"]), state["exp_avg_sq"]
            if method.second_moment == "current":
                t, v = t + 1, b2 * v + (1 - b2) * d[k] ** 2
            d[k] = d[k] / ((v / (1 - b2**t)).sqrt() + group["eps"])
    square = sum((x * (x if method.norm == "l2" else c * g[k])).sum() for k, x in d.items())
    moved = {k: p + method.rho / square.sqrt() * d[k] for k, p in params.items()}
    if method.path == "sam":
        return backward(moved, loss)
    seen_at, jacobian_at = (params, moved) if method.path == "functional" else (moved, params)
    z = z_of(seen_at).detach().requires_grad_()
    (zbar,) = torch.autograd.grad(loss(z), z)
    return backward(jacobian_at, lambda z: (z * zbar).sum())


class _Call(nn.Module):
    """`features(model, batch)` as a module's forward, for functional_call."""

    def __init__(self, model: nn.Module, features: Any) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, batch: Any) -> Any:
        return self.features(self.model, batch)
