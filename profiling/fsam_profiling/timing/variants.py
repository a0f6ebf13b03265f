"""The steps that `fsam profile step` times, ours and the peers', each as a function to call repeatedly.

A peer is what a user would write or install instead: textbook SAM and Functional-SAM, with full logits and two backward
passes; `optax.contrib.sam`; the SAM of `pytorch_optimizer`. Model, batch and AdamW settings are the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fsam_core.schedules import Kind
from fsam_profiling.settings import random_batch
from fsam_trainers import registry
from fsam_trainers.config import Framework, Settings
from fsam_trainers.data.batches import Batch, named
from fsam_trainers.device import in_torch
from fsam_trainers.models import module_of
from fsam_trainers.models.flax_decoder import nested
from fsam_trainers.models.layout import initial

# Framework -> (method, peer).
PEERS: dict[str, tuple[tuple[str, str], ...]] = {
    "jax": (
        ("adamw", "textbook"),
        ("sam", "textbook"),
        ("functional-sam", "textbook"),
        ("sam", "optax.contrib"),
    ),
    "torch": (
        ("adamw", "textbook"),
        ("sam", "textbook"),
        ("functional-sam", "textbook"),
        ("sam", "pytorch_optimizer"),
    ),
}


@dataclass(frozen=True)
class Variant:
    """One step and its settings; `peer` is empty for ours.

    `kind` is that of all steps after the first: "corrected", "reused" or "plain".
    """

    settings: Settings
    peer: str = ""
    kind: Kind = "corrected"

    @property
    def framework(self) -> Framework:
        return self.settings.framework


def peers(adamw: Settings) -> dict[tuple[str, str], Variant]:
    """(method, peer) -> variant, of the installed peers, with the settings of an AdamW step."""
    return {
        (method, whose): Variant(adamw, f"{whose} {method}")
        for method, whose in PEERS[adamw.framework]
        if whose != "pytorch_optimizer" or importlib.util.find_spec("pytorch_optimizer")
    }


def make(variant: Variant) -> Callable[[int], Any]:
    """A function that takes step 0, 1, … on the same random tokens and waits for it; compiled in JAX."""
    batch = random_batch(variant.settings)
    if variant.peer:
        whose, kind = variant.peer.split()
        return (_jax if variant.framework == "jax" else _torch)(variant.settings, whose, kind, batch)
    trained = registry.make(variant.settings)
    trained.prepare(batch)
    return lambda index: trained.step(batch, index)()


def flops(variant: Variant, run: Callable[[int], Any]) -> int:
    """FLOPs of the matrix products of one step: in JAX as it is traced, in PyTorch as it runs."""
    if variant.framework == "torch":
        from fsam_profiling.timing import torch_flops

        run(0)
        return torch_flops.count(partial(run, 1))
    from fsam_profiling import flops
    from fsam_profiling.tpu import step_programs

    if not variant.peer:
        return flops.of_step(*step_programs.of(variant.settings, variant.kind))
    whose, kind = variant.peer.split()
    return flops.of_step(*step_programs.peer(variant.settings, whose, kind))


def _jax(chosen: Settings, whose: str, kind: str, batch: Batch) -> Callable[[int], Any]:
    import jax
    import jax.numpy as jnp

    from fsam_core.jax import MicroBatches
    from fsam_profiling.tpu import step_programs

    function, (state, batches) = step_programs.peer(chosen, whose, kind)
    compiled = jax.jit(function, donate_argnums=0).lower(state, batches).compile()
    params = jax.tree.map(jnp.asarray, nested(initial(chosen.model, chosen.seed)))
    held = [(params, step_programs.optimizer_of(chosen, whose).init(params))]

    def run(index: int) -> None:
        state, loss = compiled(held.pop(), MicroBatches([named(batch)]))
        held.append(state)
        jax.block_until_ready((state, loss))

    return run


def _torch(chosen: Settings, whose: str, kind: str, batch: Batch) -> Callable[[int], Any]:
    import torch
    import torch.nn.functional as F

    from fsam_profiling.timing import textbook_torch
    from fsam_trainers.torch.engine import placed

    device, module = in_torch(), module_of("torch", chosen.model)
    model = module.Model(chosen.model, chosen.seed).to(device)
    own = placed(batch, device)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, chosen.weight_decay), (False, 0.0))
    ]
    rates: Any = {"lr": chosen.learning_rate, "betas": (chosen.b1, chosen.b2), "eps": chosen.eps}

    def logits(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The usual way for bfloat16: autocast, and the loss of float32 logits.
        with torch.autocast(device.type, torch.bfloat16, enabled=chosen.dtype == "bfloat16"):
            head = module.features(model, batch)
            z_NxV = F.linear(head.hidden, head.weight, head.bias)
        return z_NxV.float(), head.labels

    if whose == "pytorch_optimizer":
        return _pytorch_optimizer(model, groups, rates, partial(logits, model, own), chosen)
    optimizer = torch.optim.AdamW(groups, **rates)
    step = textbook_torch.step(kind, model, optimizer, logits, chosen.rho, chosen.clip_norm)
    # As our steps do, wait for the loss.
    return lambda index: float(step(own))


def _pytorch_optimizer(model: Any, groups: Any, rates: Any, logits: Any, chosen: Settings) -> Callable[[int], Any]:
    import torch
    from pytorch_optimizer import SAM

    optimizer = SAM(groups, torch.optim.AdamW, rho=chosen.rho, **rates)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(*logits())
        loss.backward()
        if chosen.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_norm)
        return loss

    def run(index: int) -> float:
        loss = closure()
        optimizer.step(closure)
        return float(loss.detach())

    return run
