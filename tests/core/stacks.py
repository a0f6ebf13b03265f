"""A stack of blocks with a norm and a head in both frameworks, and a method's gradient on it with all state given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from formula import LAST_NORMS, momenta, remembered
from problems import B2, EPS, STEPS, Weights, adamw, as_given, as_torch, head, logits_of, moments

from fsam_core import Blocks
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.options import Loss

I, D, V, LAYERS = 6, 5, 9, 3  # noqa: E741
BLOCKS = Blocks(LAYERS, r"^block_(\d+)_", r"^final_norm$|^head", r"^head", r"norm")
# Every option of a head at once; the weight is stored as [D, V].
LOSS, IGNORED = Loss(label_smoothing=0.1, z_loss=1e-2, soft_cap=2.0), 2
HEADS = ("linear", "all options", "logits")


def weights(seed: int = 0, head: str = "linear") -> dict[str, np.ndarray]:
    """A stack of blocks x + tanh(x A) n, an input matrix below and a norm's scale and a head above."""
    random = np.random.default_rng(seed)
    found = {"embedding": random.normal(size=(I, D)), "final_norm": random.uniform(0.5, 1.5, D)}
    for i in range(LAYERS):
        found[f"block_{i}_a"] = random.normal(size=(D, D)) * 0.7
        found[f"block_{i}_norm"] = random.uniform(0.5, 1.5, D)
    w_VxD = random.normal(size=(V, D))
    return found | ({"head": w_VxD.T, "head_bias": np.linspace(-1, 1, V)} if head == "all options" else {"head": w_VxD})


def prefix(p: Any, batch: dict, blocks: int) -> Any:
    x = batch["x"] @ p["embedding"]
    return through(p, x, range(blocks))


def suffix(p: Any, x: Any, batch: dict, blocks: int, kind: str = "linear") -> Any:
    h = through(p, x, range(blocks, LAYERS)) * p["final_norm"]
    if kind == "all options":
        framework = in_torch if isinstance(h, torch.Tensor) else in_jax
        options = {"bias": p["head_bias"], "layout": "DV", "loss": LOSS, "ignore_index": IGNORED}
        return framework.LinearHead(h, p["head"], batch["y"], batch["weights"], **options)
    linear = head(h, p["head"], batch)
    return logits_of(linear) if kind == "logits" else linear


def through(p: Any, x: Any, which: range) -> Any:
    tanh = torch.tanh if isinstance(x, torch.Tensor) else jnp.tanh
    for i in which:
        x = x + tanh(x @ p[f"block_{i}_a"]) * p[f"block_{i}_norm"]
    return x


def model(p: Any, batch: dict, head: str = "linear") -> Any:
    return suffix(p, prefix(p, batch, 1), batch, 1, head)


def hidden(p: dict, batch: dict) -> tuple[Any, Any, Any]:
    """(h_NxD, w_VxD, b_V or None), as the formula takes them."""
    h = through(p, prefix(p, batch, 1), range(1, LAYERS)) * p["final_norm"]
    return (h, p["head"], None) if "head_bias" not in p else (h, p["head"].T, p["head_bias"])


def staged(framework: str, blocks: int, head: str = "linear") -> Any:
    kind = in_torch.Staged if framework == "torch" else in_jax.Staged
    return kind(lambda p, b: prefix(p, b, blocks), lambda p, x, b: suffix(p, x, b, blocks, head))


def holds(method: Any) -> Any:
    """Whether the method's scope holds the parameter of a name."""
    scope = method.scope
    if callable(scope):
        return scope
    return {
        "all": lambda name: True,
        "no-head": lambda name: not name.startswith("head"),
        "norms": lambda name: "norm" in name,
        "top:2": lambda name: name.startswith(("final_norm", "head", "block_1", "block_2")),
    }[scope]


def got(
    framework: str,
    method: Any,
    batch: Any,
    *,
    clip_norm: float | None = None,
    features: Any = model,
    head: str = "linear",
    memory: Memory = AUTO,
) -> tuple[Any, dict]:
    """(Info, ĝ before clipping) with the momenta, second moments and previous gradient of the formulas."""
    values = weights(head=head)
    nu, mu, last = moments(values), momenta(values), remembered(values)
    if framework == "torch":
        net = Weights(values)
        optimizer = adamw(net, nu)
        for name, p in net.named_parameters():
            optimizer.state[p]["exp_avg"] = torch.from_numpy(mu[name])
        options = {"clip_norm": clip_norm, "blocks": BLOCKS, "memory": memory}
        step = in_torch.Step(net, optimizer, method, features=features, **options)
        previous = {str(i): torch.from_numpy(last[name]) for i, (name, _) in enumerate(net.named_parameters())}
        norms = torch.tensor(LAST_NORMS, dtype=torch.float64)
        step.load_state_dict({"steps": STEPS, "skipped_steps": 0, "previous": previous, "norms": norms})
        step.gradient(as_torch(batch))
        return step.info, {k: p.grad.numpy() for k, p in net.named_parameters()}
    grad = in_jax.value_and_grad(features, method, b2=B2, eps=EPS, clip_norm=clip_norm, blocks=BLOCKS, memory=memory)
    params, batch = jax.tree.map(jnp.asarray, (values, as_given(batch)))
    state = optax.ScaleByAdamState(jnp.int32(STEPS), mu, nu)
    zeros = in_jax.carry_of(method, params)
    carry = in_jax.Carry(
        previous=jax.tree.map(jnp.asarray, last) if zeros.previous else None,
        norms=zeros.norms and type(zeros.norms)(*map(jnp.asarray, LAST_NORMS)),
    )
    (_, info), grads = jax.jit(grad)(params, batch, state, carry)[:2]
    return info, {k: np.asarray(x) for k, x in grads.items()}
