"""This machine's rates for the cost model, measured in seconds with the framework that will run.

Products are timed at the model's own sizes, because a library's rate depends on them; everything else at sizes that no
cache holds. Each figure is the best of a few, of an otherwise idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fsam_core import backends
from fsam_core.cost import Machine, Model
from fsam_core.cost.products import Framework
from fsam_trainers.device import in_torch

ROWS, KEPT_ROWS = 4096, 1024  # of products: enough for a library's full rate
CHUNKS = 3
LARGE, NORMALS = 2**25, 2**21  # values
REPEATS = 4
Timer = Callable[[], float]


def measure(
    framework: Framework, model: Model, rows: int, chunk_rows: int, timer: Timer = time.perf_counter
) -> Machine:
    """The rates of this machine in float32 for a model, with `rows` tokens a micro-batch and `chunk_rows` at the head.

    Raises:
        UserError: when the framework is not installed.
    """
    backends.require(framework)
    make = _in_torch if framework == "torch" else _in_jax
    D, rows = model.width, min(rows, ROWS)
    F = round(model.trunk_flops / 2 / model.tokens / model.layers / D)  # all products of a block as one
    kept_rows = min(rows, KEPT_ROWS)
    trunk, head, kept, copy, taken, exponential, normal, device = make(
        rows, chunk_rows, kept_rows, D, F, model.vocabulary
    )
    best = lambda run: min(_timed(run, timer) for _ in range(REPEATS))
    bandwidth = 8 * LARGE / best(copy)
    for_taken = max(best(taken) - 8 * LARGE / bandwidth, 1e-9)
    logits = CHUNKS * chunk_rows * model.vocabulary
    for_head = best(head) - 8 * CHUNKS * model.head_parameters / bandwidth  # reading and writing w̄ is no product
    spared = device == "cpu"
    return Machine(
        f"here ({device}, {framework})",
        flops_per_s=6.0 * rows * D * F / best(trunk),
        bytes_per_s=bandwidth,
        head_flops_per_s=6.0 * logits * D / for_head,
        kept_flops_per_s=4.0 * kept_rows * model.head_parameters / best(kept),
        taken_bytes_per_s=4 * LARGE / for_taken if spared else None,
        exponentials_per_s=LARGE / max(best(exponential) - 8 * LARGE / bandwidth, 1e-9) if spared else None,
        normals_per_s=NORMALS / best(normal),
    )


def _timed(run: Callable[[], Any], timer: Timer) -> float:
    began = timer()
    kept = run()
    took = timer() - began
    del kept  # freeing memory is not timed
    return took


def _in_torch(N: int, C: int, K: int, D: int, F: int, V: int) -> tuple[Any, ...]:
    import torch

    device = in_torch()
    new = lambda *shape: torch.randn(shape, device=device) * 1e-3
    x_NxD, w_DxF, g_NxF = new(N, D), new(D, F), new(N, F)
    h_CxD, w_VxD, wbar_VxD, p_CxV, hbar_CxD = new(C, D), new(V, D), new(V, D), new(C, V), new(C, D)
    q_KxV, h_KxD, hbar_KxD = new(K, V), new(K, D), new(K, D)
    a, b = new(LARGE), new(LARGE)
    outs = new(N, F), new(N, D), new(D, F)

    def waits(run: Callable[[], Any]) -> Callable[[], Any]:
        def waiting() -> Any:
            kept = run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            return kept

        waiting()
        return waiting

    def trunk() -> None:
        torch.mm(x_NxD, w_DxF, out=outs[0])
        torch.mm(g_NxF, w_DxF.T, out=outs[1])
        torch.mm(x_NxD.T, g_NxF, out=outs[2])

    def head() -> None:
        for _ in range(CHUNKS):
            torch.mm(h_CxD, w_VxD.T, out=p_CxV)
            torch.mm(p_CxV, w_VxD, out=hbar_CxD)
            wbar_VxD.addmm_(p_CxV.T, h_CxD)

    def kept() -> None:
        torch.mm(q_KxV, w_VxD, out=hbar_KxD)
        wbar_VxD.addmm_(q_KxV.T, h_KxD)

    exponential = lambda: torch.exp(a, out=b)
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda: torch.randn(NORMALS, generator=generator, device=device)
    return (*map(waits, (trunk, head, kept, lambda: b.copy_(a), a.clone, exponential, normal)), device.type)


def _in_jax(N: int, C: int, K: int, D: int, F: int, V: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    random = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32) * np.float32(1e-3))
    x_NxD, w_DxF, g_NxF = new(N, D), new(D, F), new(N, F)
    h_CxD, w_VxD, q_KxV, h_KxD = new(C, D), new(V, D), new(K, V), new(K, D)
    held = {"wbar": new(V, D), "copy": new(LARGE), "exp": new(LARGE)}
    large = held["copy"] + 0

    @jax.jit
    def products(x: Any, w: Any, g: Any) -> Any:
        return x @ w, g @ w.T, x.T @ g

    @jax.jit
    def chunks(wbar: Any, h: Any, w: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            wbar, h = carry
            p_CxV = h @ w.T
            return (wbar + p_CxV.T @ h, p_CxV @ w * 1e-3), ()

        return jax.lax.scan(one, (wbar, h), length=CHUNKS)[0]

    @jax.jit
    def whole(wbar: Any, q: Any, h: Any, w: Any) -> Any:
        return wbar + q.T @ h, q @ w

    in_place = lambda function: jax.jit(function, donate_argnums=0)
    scaled, exponentials = in_place(lambda x: x * 0.5), in_place(lambda x: jnp.exp(x - 1))
    fresh = jax.jit(lambda x: x * 0.5)
    key, drawn = jax.random.key(0), jax.jit(lambda key: jnp.sum(jax.random.normal(key, (NORMALS,))))

    def held_by(name: str, function: Any) -> Callable[[], None]:
        def run() -> None:
            held[name] = jax.block_until_ready(function(held[name]))

        return run

    def warm(run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        return run

    runs = (
        lambda: jax.block_until_ready(products(x_NxD, w_DxF, g_NxF)),
        lambda: jax.block_until_ready(chunks(held["wbar"], h_CxD, w_VxD)),
        lambda: jax.block_until_ready(whole(held["wbar"], q_KxV, h_KxD, w_VxD)),
        held_by("copy", scaled),
        lambda: jax.block_until_ready(fresh(large)),
        held_by("exp", exponentials),
        lambda: jax.block_until_ready(drawn(key)),
    )
    return (*map(warm, runs), jax.devices()[0].platform)
