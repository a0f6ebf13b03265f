"""Every option of the step in float64 JAX, straight from its formula: whole logits, nothing shared, nothing saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from problems import B2, EPS, STEPS, moments

from fsam_core import Perturbed


def momenta(weights: dict) -> dict[str, np.ndarray]:
    return {k: v * 30 - 0.01 for k, v in moments(weights, seed=11).items()}


def remembered(weights: dict) -> dict[str, np.ndarray]:
    return {k: v * 100 - 0.05 for k, v in moments(weights, seed=12).items()}


def part_of(batches: list[dict], fraction: float) -> list[dict]:
    """The first micro-batches; where that is less than one, every n-th row of the first."""
    whole = fraction * len(batches)
    if whole >= 1:
        assert whole == int(whole)
        return batches[: int(whole)]
    n = round(1 / whole)
    return [{k: x[::n] for k, x in batches[0].items()}]


def gradient_of(
    hidden: Callable[[dict, dict], tuple[Any, Any]],
    weights: dict,
    batches: list[dict],
    method: Perturbed,
    *,
    clip_norm: float | None = None,
    holds: Callable[[str], bool] = lambda name: True,
    drawn: dict | None = None,
    steps: int = STEPS,
) -> tuple[dict, float]:
    """(ĝ, ‖ε‖₂); `hidden` gives (h_NxD, w_VxD), `holds` says which names the scope holds, `drawn` a random ascent."""
    # Drawn before JAX sorts the names.
    known = {"nu": moments(weights), "momentum": momenta(weights), "previous": remembered(weights), "random": drawn}
    known["-momentum"] = {k: -x for k, x in known["momentum"].items()}
    # Drawn before JAX sorts the names.
    known = {"nu": moments(weights), "momentum": momenta(weights), "previous": remembered(weights), "random": drawn}
    known["-momentum"] = {k: -x for k, x in known["momentum"].items()}
    params = jax.tree.map(jnp.asarray, weights)
    if method.direction.source == "micro":
        each = [_gradient(hidden, params, [b], method, clip_norm, holds, known, steps) for b in batches]
        counts = np.array([float(np.sum(b["y"] >= 0)) for b in batches])
        mean = lambda *x: sum(y * c for y, c in zip(x, counts / counts.sum(), strict=True))
        return jax.tree.map(mean, *(g for g, _ in each)), float(mean(*(e for _, e in each)))
    return _gradient(hidden, params, batches, method, clip_norm, holds, known, steps)


def _gradient(hidden, params, batches, method, clip_norm, holds, known, steps) -> tuple[dict, float]:
    join = lambda some: {k: np.concatenate([b[k] for b in some]) for k in some[0]}
    B, S = join(batches), join(part_of(batches, method.fraction))
    A = join(part_of(batches, method.share)) if method.direction.source == "part" else B

    def nll(z, batch):
        y = batch["y"]
        return jnp.sum(jnp.where(y >= 0, -jax.nn.log_softmax(z)[jnp.arange(len(y)), y], 0)) / np.sum(y >= 0)

    def logits(p, batch):
        h, w = hidden(p, batch)
        return h @ w.T

    grad_at = lambda p, batch: jax.grad(lambda p: nll(logits(p, batch), batch))(p)
    ascent = {
        "full": lambda: grad_at(params, B),
        "part": lambda: grad_at(params, A),
        "micro": lambda: grad_at(params, B),
    }.get(method.direction.name, lambda: known[method.direction.name])()
    a = {k: jnp.asarray(x) for k, x in ascent.items() if holds(k)}
    total = lambda tree: jnp.sqrt(sum(jnp.sum(x**2) for x in tree.values()))
    c = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / total(a))
    a = {k: c * x for k, x in a.items()}
    d = dict(a)
    if method.precondition:
        current = method.second_moment == "current"
        for k, x in a.items():
            v = known["nu"][k]
            v = B2 * v + (1 - B2) * x**2 if current else v
            d[k] = x / (jnp.sqrt(v / (1 - B2 ** (steps + current))) + EPS)
    if method.norm == "per-tensor":
        eps = {k: method.rho * x / jnp.sqrt(jnp.sum(x**2)) for k, x in d.items()}
    else:
        square = total(d) ** 2 if method.norm == "l2" else sum(jnp.sum(a[k] * d[k]) for k in d)
        eps = {k: method.rho * x / jnp.sqrt(square) for k, x in d.items()}
    moved = {k: x + eps.get(k, 0) for k, x in params.items()}

    def changed(batch):
        """g' of a batch."""
        if method.path == "sam":
            return grad_at(moved, batch)
        if method.path == "logit":
            zbar = jax.grad(nll)(logits(moved, batch), batch)
            return jax.grad(lambda p: jnp.sum(logits(p, batch) * zbar))(params)
        if method.cut == "hidden":
            h, w = hidden(params, batch)
            hbar, wbar = jax.grad(lambda h, w: nll(h @ w.T, batch), (0, 1))(h, w)
            of_head = jax.grad(lambda p: jnp.sum(hidden(p, batch)[1] * wbar))(params)
            of_trunk = jax.grad(lambda p: jnp.sum(hidden(p, batch)[0] * hbar))(moved)
            return jax.tree.map(jnp.add, of_head, of_trunk)
        zbar = jax.grad(nll)(logits(params, batch), batch)
        return jax.grad(lambda p: jnp.sum(logits(p, batch) * zbar))(moved)

    if method.exact:
        return changed(B), float(total(eps))
    g_B, g_S, w = grad_at(params, B), grad_at(params, S), method.strength
    return jax.tree.map(lambda b, m, s: b + w * (m - s), g_B, changed(S), g_S), float(total(eps))
