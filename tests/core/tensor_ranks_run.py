"""Runs the cases of four gloo processes; those of models whose vocabulary is sharded over a tensor axis are here.

    python tensor_ranks_run.py RESULTS.json CASE ...

The processes are forked, so that PyTorch is imported once, with the modules that it would import at the first step.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ranks_run
import spawn
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_behaviour import Changed, raising
from ranks_run import ADAM, PARTS, RANKS, Case, D, V, batch_of, features, made, trained, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fsam_core import torch as fsam
from fsam_core.torch import FunctionalSAM, LinearHead, LogitSAM, Loss, Memory, Plain, Step
from fsam_core.torch.dtensor import local

LOSS = Loss(label_smoothing=0.1, z_loss=1e-2, soft_cap=5.0)


class Untied(nn.Module):
    """A replicated trunk, and a head [D, V] with a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(D, D, generator=generator) * 0.3)
        self.head = nn.Parameter(torch.randn(D, V, generator=generator) * 0.3)
        self.bias = nn.Parameter(torch.randn(V, generator=generator) * 0.3)


def of_untied(model: Any, batch: dict, layout: str = "DV") -> LinearHead:
    h = torch.tanh(F.embedding(batch["x"], model.embedding).cumsum(1) @ model.up)
    weights = 1 + (batch["x"] % 3).float()
    head = model.head if layout == "DV" else model.head.T
    return LinearHead(h, head, batch["y"], weights, model.bias, layout, LOSS, ignore_index=5)


def untied(kind: str) -> nn.Module:
    model = Untied()
    if kind == "one":
        return model
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", (PARTS[kind], RANKS // PARTS[kind]), mesh_dim_names=("data", "tensor")
    )
    model.head = nn.Parameter(distribute_tensor(model.head.detach(), mesh["tensor"], [Shard(1)]))
    model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh["tensor"], [Shard(0)]))
    return model if kind == "tensor" else fully_shard(model, mesh=mesh["data"])


def mesh_of(kind: str) -> Any:
    sizes = (PARTS[kind], RANKS // PARTS[kind])
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))


def options(kind: str, rank: int) -> dict[str, float]:
    """All options of a head, z̄ kept and recomputed, over several chunks: distances from one process."""
    worst = {}
    for name, method, memory in (
        ("keep", FunctionalSAM(0.1, **ADAM), Memory("keep")),
        ("recompute", FunctionalSAM(0.1, **ADAM), Memory("recompute", chunk_bytes=4096)),
        ("logit", LogitSAM(0.1), Memory("keep", chunk_bytes=4096)),
        ("hidden", FunctionalSAM(0.1, cut="hidden", fraction=0.5), Memory()),
    ):
        runs = []
        for of, here in ((kind, rank), ("one", None)):
            model = untied(of)
            optimizer = fsam.AdamW(model.parameters(), lr=0.01, eps=1e-4)
            view = functools.partial(of_untied, layout="VD") if name == "keep" else of_untied
            step = Step(model, optimizer, method, features=view, clip_norm=0.1, memory=memory)
            figures = [[float(step(batch_of(i, 2, here, kind))), *step.info[2:6]] for i in range(2)]
            runs.append(([whole(p) for p in model.parameters()], torch.tensor(figures, dtype=torch.float64)))
        (tensors, figures), (expected, expected_figures) = runs
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(tensors, expected, strict=True))
        worst[name] = max(apart, float((figures / expected_figures - 1).abs().max()))
    return worst


def same(kind: str, rank: int) -> dict[str, Any]:
    """Whether replicated weights are the same on the ranks of the tensor axis, to the bit, after some steps."""
    step = made(Case(FunctionalSAM(0.1, **ADAM, fraction=1 / 4), clip=0.1), kind)
    for index in range(6):
        step(batch_of(index, 1, rank, kind))
    axes_of = lambda p: p.device_mesh.mesh_dim_names if isinstance(p, DTensor) else ()
    uncut = [p for p in step.model.parameters() if "tensor" not in axes_of(p)]
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, [local(p).detach() for p in uncut])
    pairs = zip(every[rank], every[rank ^ 1], strict=True)  # the neighbour on the tensor axis
    return {"uncut": len(uncut), "same": all(torch.equal(a, b) for a, b in pairs)}


def not_finite(rank: int) -> dict[str, Any]:
    """A hidden state that overflows on one tensor rank alone: all ranks skip, or their replicas would differ."""
    changed = Changed()
    step = made(Case(FunctionalSAM(0.1)), "tensor", changed)
    infinite = float("inf") if rank == 2 else 1.0
    changed.change = lambda head: dataclasses.replace(head, hidden=head.hidden * infinite)
    before = [whole(p) for p in step.model.parameters()]
    step(batch_of(0, 1, rank, "tensor"))
    kept = all(torch.equal(a, whole(b)) for a, b in zip(before, step.model.parameters(), strict=True))
    return {"skipped": step.info.skipped, "kept": kept}


def checkpointed(rank: int) -> dict[str, Any]:
    """A checkpoint of a 2 x 2 mesh by torch.distributed.checkpoint resumes there and loads in one process."""
    case, kind = Case(FunctionalSAM(0.1, **ADAM)), "fsdp-tensor"
    step = made(case, kind)
    for index in range(2):
        step(batch_of(index, 1, rank, kind))
    names: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(names)
    model, optimizer = get_state_dict(step.model, step.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=names[0])
    expected = [whole(p) for p in step.model.parameters()]
    losses = [float(step(batch_of(2, 1, rank, kind)))]
    after = [whole(p) for p in step.model.parameters()]

    other = made(case, kind)
    other(batch_of(9, 1, rank, kind))  # moments to load into
    model, optimizer = get_state_dict(other.model, other.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=names[0])
    set_state_dict(other.model, other.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses.append(float(other(batch_of(2, 1, rank, kind))))
    resumes = all(torch.equal(a, whole(b)) for a, b in zip(after, other.model.parameters(), strict=True))
    alone = {"model": ranks_run.Model().state_dict()}
    dcp.load(alone, checkpoint_id=names[0])
    loads = all(torch.equal(a, b) for a, b in zip(expected, alone["model"].values(), strict=True))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(names[0])
    return {"loss": losses[0] == losses[1], "resumes": resumes, "loads": loads}


def evaluated(rank: int) -> dict[str, Any]:
    loss, whole_batch = fsam.mean_loss(features), batch_of(0, 1, None).batches[0]
    of = lambda kind: float(loss(ranks_run.wrapped(kind), batch_of(0, 1, rank, kind).batches[0]))
    expected = float(loss(ranks_run.Model(), whole_batch))
    return {"apart": [abs(of(kind) / expected - 1) for kind in ("tensor", "fsdp-tensor")]}


def mixed(rank: int) -> dict[str, Any]:
    """bfloat16 compute weights over float32 shards, on a 2 x 2 mesh: losses against those of float32."""
    mesh = mesh_of("fsdp-tensor")
    model = ranks_run.Model()
    ranks_run.cut(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    method = FunctionalSAM(0.1, **ADAM)
    step = Step(model, fsam.AdamW(model.parameters(), lr=0.01, eps=1e-4), method, features=features)
    losses = torch.tensor([float(step(batch_of(i, 2, rank, "fsdp-tensor"))) for i in range(3)])
    expected = trained(Case(method, micro=2), "one", 3, None)[1][:, 0]
    dtypes = {str(p.dtype) for p in model.parameters()}
    return {"apart": float((losses / expected - 1).abs().max()), "dtypes": sorted(dtypes)}


def refused(rank: int) -> dict[str, Any]:
    """The error sentence of each set-up that is refused."""
    mesh, square = mesh_of("tensor")["tensor"], mesh_of("fsdp-tensor")
    batch = batch_of(0, 1, None).batches[0]

    def said(changed: Any = None, **instead: Any) -> str:
        model = Untied()
        model.head = nn.Parameter(distribute_tensor(model.head.detach(), mesh, [Shard(1)]))
        model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh, [Shard(0)]))
        of = lambda model, batch: dataclasses.replace(
            of_untied(model, batch), **{k: f(model) for k, f in instead.items()}
        )
        try:
            if changed is not None:
                changed(model)
            Step(model, fsam.AdamW(model.parameters()), Plain(), features=of)(batch)
        except fsam.UserError as error:
            return str(error)
        return ""

    def with_copies(model: nn.Module) -> None:
        Step(model, fsam.AdamW(copies := fsam.masters(model), copies=copies), Plain(), features=of_untied)

    def on_square(model: nn.Module) -> None:
        model.head = nn.Parameter(distribute_tensor(Untied().head.detach(), square, [Replicate(), Shard(1)]))
        model.bias = None

    placed = lambda shape, mesh, placements: distribute_tensor(torch.zeros(shape), mesh, placements)
    uneven = lambda model: DTensor.from_local(
        torch.zeros(D, 12 if rank else 1), mesh, [Shard(1)], run_check=False, shape=(D, V), stride=(V, 1)
    )
    y_shape = tuple(batch["y"].shape)
    return {
        "features": said(weight=lambda model: placed((D, V), mesh, [Shard(0)])),
        "axes": said(weight=lambda model: placed((D, V), square, [Replicate(), Shard(1)])),
        "uneven": said(weight=uneven),
        "bias": said(bias=lambda model: torch.zeros(V)),
        "bias alone": said(weight=lambda model: torch.zeros(D, V)),
        "hidden": said(hidden=lambda model: placed((*y_shape, D), mesh, [Shard(1)])),
        "labels": said(labels=lambda model: placed(y_shape, mesh, [Shard(0)]).long()),
        "copies": said(with_copies),
        "no data": said(on_square),
        "": said(hidden=lambda model: placed((*y_shape, D), mesh, [Replicate()])),
    }


ranks_run.EXTRA |= {
    "options-tensor": functools.partial(options, "tensor"),
    "options-fsdp-tensor": functools.partial(options, "fsdp-tensor"),
    "same-tensor": functools.partial(same, "tensor"),
    "same-fsdp-tensor": functools.partial(same, "fsdp-tensor"),
    "raising-tensor": functools.partial(raising, "tensor"),
    "raising-fsdp-tensor": functools.partial(raising, "fsdp-tensor"),
    "not-finite-tensor": not_finite,
    "checkpointed": checkpointed,
    "evaluated-tensor": evaluated,
    "mixed": mixed,
    "refused-tensor": refused,
}

if __name__ == "__main__":
    ranks_run.prepare(sys.argv[2:])
    sys.exit(spawn.fork_ranks(RANKS, ranks_run.one_process, Path(sys.argv[1]), sys.argv[2:]))
