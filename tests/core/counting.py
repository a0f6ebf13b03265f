"""What PyTorch runs and what XLA compiles, counted: the operations of a step's matrix products."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.utils.checkpoint import checkpoint

from fsam_core import Method, Plain, Schedule, cost
from fsam_core import jax as in_jax
from fsam_core import torch as in_torch
from fsam_kernels.memory import Memory
from fsam_profiling.timing import torch_flops
from fsam_trainers.cost_table import counted
from fsam_trainers.models import flax_decoder, torch_decoder
from fsam_trainers.models.layout import ModelConfig, blocks

CONFIG = ModelConfig(layers=2, width=64, heads=4, seq_len=32, vocab_size=768)
BATCH = 8
# 16 rows in JAX and 32 in PyTorch, so that the head of an eighth of the batch, 32 rows, is in a loop too.
CHUNK_BYTES = 16 * CONFIG.vocab_size * 8


def counted_in(framework: str, o: cost.Options, config: ModelConfig = CONFIG, *, kind: str = "corrected") -> float:
    """Operations of the products of one such step, as the framework has them."""
    count = _in_torch if framework == "torch" else _in_jax
    return count(o.method, o, config, kind)


def predicted(framework: str, o: cost.Options, config: ModelConfig = CONFIG, *, kind: str = "corrected") -> float:
    """The same by the cost model."""
    found = cost.estimate(counted(config, framework), o, BATCH * config.seq_len)
    return found.steps[kind].flops


def tokens(config: ModelConfig = CONFIG) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, config.seq_len + 1), dtype=np.int32)


def _in_torch(method: Method, o: cost.Options, config: ModelConfig, kind: str) -> float:
    model = torch_decoder.Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    features: Any = torch_decoder.features
    if o.scope.startswith("top:"):
        features = torch_decoder.staged(config.layers - int(o.scope.removeprefix("top:")))
    step = in_torch.Step(
        model,
        optimizer,
        Plain() if kind == "plain" else method,
        features=partial(_rematerialized, features) if o.remat else features,
        schedule=Schedule(between=o.between),
        blocks=blocks(config),
        memory=Memory(o.cotangent, chunk_bytes=o.chunk_bytes),
    )
    batch = in_torch.MicroBatches(torch.from_numpy(x).long() for x in np.split(tokens(config), o.micro_batches))
    step.gradient(batch)  # a staged step looks at its prefix once, before the first
    return torch_flops.count(lambda: step.gradient(batch))


def _rematerialized(features: Any, model: Any, batch: Any) -> Any:
    """The trunk under activation checkpointing."""
    inner = checkpoint(lambda x: model(x[:, :-1])[0], batch, use_reentrant=False)
    return in_torch.LinearHead(inner, model.embedding, batch[:, 1:].reshape(-1))


def _in_jax(method: Method, o: cost.Options, config: ModelConfig, kind: str) -> float:
    return products(compiled(method, o, config, kind).as_text())


def compiled(method: Method, o: cost.Options, config: ModelConfig, kind: str) -> Any:
    """The gradient function of such a step, compiled."""
    features: Any = partial(flax_decoder.features, flax_decoder.Decoder(config))
    if o.scope.startswith("top:"):
        features = flax_decoder.staged(flax_decoder.Decoder(config), config.layers - int(o.scope.removeprefix("top:")))
    grad = in_jax.value_and_grad(
        partial(_rematerialized_in_jax, features) if o.remat else features,
        method,
        b2=0.95,
        blocks=blocks(config),
        memory=Memory(o.cotangent, chunk_bytes=o.chunk_bytes),
    )
    params = flax_decoder.parameters(config, 0)
    state = optax.ScaleByAdamState(jnp.int32(3), params, params)
    batch = in_jax.MicroBatches({"tokens": x} for x in np.split(tokens(config), o.micro_batches))
    carry = in_jax.carry_of(method, params, Schedule(between=o.between))
    return jax.jit(partial(grad, kind=kind)).lower(params, batch, state, carry).compile()


def _rematerialized_in_jax(features: Any, params: Any, batch: Any) -> Any:
    @jax.checkpoint
    def trunk(params: Any) -> Any:
        return features(params, batch).hidden

    return in_jax.LinearHead(trunk(params), params["embedding"], batch["tokens"][:, 1:].reshape(-1))


def products(program: str) -> float:
    """2 · multiply-adds of the dots of a compiled program's text, a loop's body as often as it turns."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if found := re.match(r"(ENTRY )?(%\S+) \(.*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            computations[name] = []
        elif " = " in line:
            computations[name].append(line)
    assert "custom-call" not in program, "a product may hide in it"

    def operations(of: str) -> float:
        lines = computations[of]
        shapes = dict(found.groups() for line in lines if (found := re.search(r"(%\S+) = \w+\[([\d,]*)\]", line)))
        total = 0.0
        for line in lines:
            if found := re.search(r"= \w+\[([\d,]*)\]\S* dot\((%[^,\s]+), .*lhs_contracting_dims=\{([\d,]+)\}", line):
                left = _sizes(shapes[found[2]])
                total += 2 * math.prod(_sizes(found[1])) * math.prod(left[i] for i in _sizes(found[3]))
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            assert " while(" not in line or turns, line
            for inner in re.findall(r"(?:calls|to_apply|body|condition)=(%[^,\s}]+)", line):
                total += (int(turns[1]) if turns else 1) * operations(inner)
        return total

    return operations(entry)


def _sizes(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]
