"""The overhead of `Step` under FSDP2: an AdamW step by it, compared with the same step written by hand.

    python profiling/experiments/wrapper_overhead.py --preset tiny
    torchrun --nproc-per-node 4 profiling/experiments/wrapper_overhead.py

Both run the same decoder under `fully_shard`, the same head and the same optimizer. The step by hand computes the loss
inside the model's forward pass, clips by `clip_grad_norm_` and reads the loss on the host, as a pretraining loop does.
The difference is bookkeeping: calls through the wrapper, DTensor dispatch, norms, the test for finiteness.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fsam_core.torch as fsam
from fsam_core import UserError, backends
from fsam_profiling import results
from fsam_profiling.settings import random_tokens, step_settings
from fsam_trainers import timing
from fsam_trainers.models import torch_decoder
from fsam_trainers.models.layout import ModelConfig
from fsam_trainers.timing import relative_cost

CLIP = 1.0
BY_HAND = "by hand"


@dataclass(frozen=True)
class OverheadOptions:
    """Time an AdamW step of `Step` under FSDP2, compared with the same by hand."""

    preset: str = "tiny"
    """model size, as in `fsam train`"""
    batch: int | None = None
    """sequences a step and rank"""
    seq_len: int | None = None
    """tokens a sequence"""
    repeats: int = 30
    """steps of each"""
    json: Path | None = None
    """also write the figures here"""


class _MeanLoss(torch.autograd.Function):
    """The head's one pass as a node of autograd, which computes the gradients with the loss."""

    @staticmethod
    def forward(ctx: Any, ops: ModuleType, h_NxD: Tensor, w_VxD: Tensor, labels_N: Tensor) -> Tensor:
        share_N = torch.full(labels_N.shape, 1 / len(labels_N), device=labels_N.device)
        loss_N, _, _, gradients = ops.linear_cross_entropy(h_NxD, w_VxD, labels_N, share_N, gradient=True)
        ctx.save_for_backward(*gradients[:2])
        return (loss_N * share_N).sum()

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        hbar_NxD, wbar_VxD = ctx.saved_tensors
        return None, hbar_NxD * given[0], wbar_VxD * given[0], None


class _WithLoss(nn.Module):
    """Tokens [B, L+1] -> mean loss."""

    def __init__(self, decoder: nn.Module, ops: ModuleType) -> None:
        super().__init__()
        self.decoder, self.ops = decoder, ops

    def forward(self, tokens_BxL1: Tensor) -> Tensor:
        h_NxD, w_VxD = self.decoder(tokens_BxL1[:, :-1])
        return _MeanLoss.apply(self.ops, h_NxD, w_VxD, tokens_BxL1[:, 1:].reshape(-1))


def by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], float]:
    """tokens -> loss, after one step of a plain loop."""

    def step(tokens_BxL1: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens_BxL1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        dist.all_reduce(mean := loss.detach().clone())
        return float(mean) / dist.get_world_size()

    return step


def steps(config: ModelConfig) -> dict[str, Callable[[Tensor], Any]]:
    """Name -> step, each of a model of its own with the same weights; within a process group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ops = backends.load("torch", "torch")
    found: dict[str, Callable[[Tensor], Any]] = {}
    for name in (BY_HAND, "Step", "Step, fsam's AdamW"):
        decoder = torch_decoder.Decoder(config, 0)
        for block in decoder.children():
            fully_shard(block, mesh=mesh)
        whole = _WithLoss(decoder, ops) if name == BY_HAND else decoder
        fully_shard(whole, mesh=mesh)
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 1e-4}
        if name == BY_HAND:
            found[name] = by_hand(whole, torch.optim.AdamW(whole.parameters(), fused=True, **settings), whole)
            continue
        ours = fsam.AdamW(decoder.parameters(), **settings)
        theirs = torch.optim.AdamW(decoder.parameters(), fused=True, **settings)
        optimizer = theirs if name == "Step" else ours
        features = torch_decoder.features
        found[name] = fsam.Step(decoder, optimizer, fsam.Plain(), features=features, clip_norm=CLIP, backend="torch")
    return found


def measure(options: OverheadOptions) -> list[dict[str, Any]]:
    """One row a step: its milliseconds and its ratio to the one by hand, median with the 20th and 80th percentile.

    Raises:
        UserError: for an unknown preset, or fewer than ten repeats.
    """
    if options.repeats < 10:
        raise UserError(f"--repeats must be at least 10 for a median worth printing, got {options.repeats}")
    chosen = step_settings(options.preset, "adamw", batch=options.batch, seq_len=options.seq_len)
    tokens_BxL1 = torch.from_numpy(random_tokens(chosen)).long()
    all_steps = steps(chosen.model)
    losses = {name: [float(step(tokens_BxL1)) for _ in range(2)] for name, step in all_steps.items()}
    for values in losses.values():  # the same work, or there is nothing to compare
        torch.testing.assert_close(values, losses[BY_HAND], rtol=1e-5, atol=0)
    turn = {name: partial(_on, step, tokens_BxL1) for name, step in all_steps.items()}
    times = timing.interleaved(turn, options.repeats, warm_up=1)
    return [{"step": name, **relative_cost(ms, times[BY_HAND])._asdict()} for name, ms in times.items()]


def _on(step: Callable[[Tensor], Any], tokens_BxL1: Tensor, index: int) -> Any:
    return step(tokens_BxL1)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The ranks of torchrun, or one without it."""
    with TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def main() -> None:
    options = tyro.cli(OverheadOptions, prog="python profiling/experiments/wrapper_overhead.py")
    try:
        with process_group():
            rows = measure(options)
            is_main, count = dist.get_rank() == 0, dist.get_world_size()
    except UserError as error:
        sys.exit(f"wrapper_overhead: error: {error}")
    if not is_main:
        return
    if options.json is not None:
        about = {"preset": options.preset, "ranks": count, "repeats": options.repeats}
        results.write(options.json, "wrapper overhead", rows, about, "wrapper_overhead")
    table = Table("AdamW step", "ms", "x by hand (20–80 %)", title=f"{options.preset}, FSDP2 of {count} ranks")
    for row in rows:
        spread = f"{row['ratio']:.3f} ({row['ratio_p20']:.3f}–{row['ratio_p80']:.3f})"
        table.add_row(row["step"], f"{row['step_ms']:.1f}", spread)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
