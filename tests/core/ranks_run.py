"""Four gloo processes train what one process trains, case by case: the models, the cases and the comparison.

A case is KIND:NAME[:STEPS], KIND a way to wrap the model and NAME one of `CASES`; or run:NAME, one of `EXTRA`, where
other files put theirs. `tensor_ranks_run.py` is the command.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.distributed
import torch.distributed as dist
import torch.nn.functional as F
from collective_counts import Collectives
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fsam_core import schedules
from fsam_core import torch as fsam
from fsam_core.combining import looksam
from fsam_core.torch import SAM, Ascent, FunctionalSAM, LinearHead, LogitSAM, MicroBatches, Plain, Schedule, Step

RANKS, V, D, L, ROWS = 4, 37, 8, 5, 16
STEPS = 20  # of a run whose case has no number
COMPILED: Counter[str] = Counter()  # graphs that torch.compile captured in this process, and their runs
# Data-parallel parts of the kinds with a tensor axis, whose ranks share a part of the batch.
PARTS = {"tensor": 1, "fsdp-tensor": 2, "fsdp-tensor-remat": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes: micro: micro-batches; clip: clip_norm; local: sync."""

    method: Any
    micro: int = 1
    clip: float | None = None
    schedule: Schedule = schedules.ALWAYS
    sync: str = "global"
    staged: bool = False
    foreign: bool = False  # torch.optim.AdamW instead of this project's
    heads: bool = False  # several heads instead of one
    tied: bool = True


ADAM = {"precondition": "adam"}
SPLIT: dict[str, Any] = {"form": "split", "fraction": 1 / 2, "ascent": "rest"}
CASES = {
    "adamw": Case(Plain()),
    "adamw-clip": Case(Plain(), clip=0.1, micro=2),
    "sam": Case(SAM(0.1)),
    "precond-sam": Case(SAM(0.1, **ADAM), clip=0.1, micro=2),
    "functional": Case(FunctionalSAM(0.1)),
    "precond-functional": Case(FunctionalSAM(0.1, **ADAM), clip=0.1),
    "precond-functional-micro": Case(FunctionalSAM(0.1, **ADAM), micro=4, foreign=True),
    "logit": Case(LogitSAM(0.1), micro=2),
    "quarter": Case(FunctionalSAM(0.1, **ADAM, fraction=1 / 4), clip=0.1),
    "half-of-four": Case(FunctionalSAM(0.1, **ADAM, fraction=1 / 2), micro=4, clip=0.1),
    "quarter-part": Case(FunctionalSAM(0.1, **ADAM, fraction=1 / 4, ascent="part"), micro=2),
    "quarter-sam": Case(SAM(0.1, **ADAM, fraction=1 / 4)),
    "part-sam": Case(SAM(0.1, ascent="part", ascent_fraction=1 / 2, strength=0.5), micro=2),
    "quarter-logit": Case(LogitSAM(0.1, fraction=1 / 4, strength=0.5), micro=2),
    "hidden": Case(FunctionalSAM(0.1, **ADAM, cut="hidden"), micro=2),
    "hidden-untied": Case(FunctionalSAM(0.1, **ADAM, cut="hidden"), micro=2, tied=False),
    "hidden-quarter": Case(FunctionalSAM(0.1, **ADAM, cut="hidden", fraction=1 / 4)),
    "every": Case(FunctionalSAM(0.1, **ADAM), schedule=Schedule(every=2)),
    "reuse": Case(FunctionalSAM(0.1, **ADAM), schedule=Schedule(every=2, between="reuse")),
    "start": Case(FunctionalSAM(0.1, **ADAM), schedule=Schedule(start=10)),
    "momentum": Case(FunctionalSAM(0.1, **ADAM, ascent="momentum")),
    "previous": Case(SAM(0.1, ascent="previous"), clip=0.1),
    "memory": Case(SAM(0.1, ascent="vasso", norm_from="previous"), clip=0.1),
    "looksam": Case(SAM(0.1, reuse=looksam(0.7)), schedule=Schedule(every=2, between="reuse")),
    "random": Case(FunctionalSAM(0.1, ascent="random")),
    "micro": Case(FunctionalSAM(0.1, ascent="micro"), micro=2),
    "own-ascent": Case(SAM(0.1, ascent=Ascent("surprise", lambda s: s.map(torch.sub, s.gradient, s.momentum)))),
    "top": Case(FunctionalSAM(0.1, scope="top:1"), staged=True),
    "dual": Case(FunctionalSAM(0.1, **ADAM, norm="dual")),
    "per-tensor": Case(FunctionalSAM(0.1, norm="per-tensor")),
    "split": Case(SAM(0.1, **ADAM, **SPLIT), clip=0.1),
    "split-functional": Case(FunctionalSAM(0.1, **ADAM, **SPLIT), micro=2),
    "split-known": Case(SAM(0.1, **(SPLIT | {"ascent": "momentum"})), micro=4, foreign=True),
    "heads": Case(FunctionalSAM(0.1, **ADAM, fraction=1 / 2), micro=2, clip=0.1, heads=True),
    "hidden-heads": Case(FunctionalSAM(0.1, **ADAM, cut="hidden"), heads=True),
}
EXTRA: dict[str, Callable[[int], Any]] = {}


class Model(nn.Module):
    """Sizes that four ranks do not divide, a norm, a head that is tied, or not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator) * 0.3)
        self.blocks = nn.ModuleList([Block(generator) for _ in range(2)])
        self.head = None if tied else nn.Parameter(torch.randn(V, D, generator=generator) * 0.3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = looked_up(tokens, self.embedding)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))
        self.up = nn.Parameter(torch.randn(D, 3 * D, generator=generator) * 0.3)
        self.down = nn.Parameter(torch.randn(3 * D, D, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_normed = F.layer_norm(x.cumsum(1), (D,), self.scale)
        if not isinstance(self.up, DTensor):
            return x + torch.tanh(x_normed @ self.up) @ self.down
        x_everywhere = DTensor.from_local(x_normed, self.up.device_mesh, [Replicate()])
        return x + (torch.tanh(x_everywhere @ self.up) @ self.down).full_tensor()


def looked_up(tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding, which may be sharded along its rows."""
    if not isinstance(embedding, DTensor):
        return F.embedding(tokens, embedding)
    mesh = embedding.device_mesh
    return F.embedding(DTensor.from_local(tokens, mesh, [Replicate()]), embedding).full_tensor()


def features(model: Any, batch: dict) -> LinearHead:
    """Written as for one process: the head's weight is read from the model."""
    return LinearHead(model(batch["x"]), model.embedding if model.head is None else model.head, batch["y"])


def several(model: Any, batch: dict) -> fsam.Heads:
    """Two predictions of the tied head, from two activations, and a loss of an activation."""
    x = looked_up(batch["x"], model.embedding)
    middle = model.blocks[0](x)
    linear = [LinearHead(h, model.embedding, batch["y"]) for h in (model.blocks[1](middle), middle)]
    # Its factor is 0: several ranks weight it by their targets, so that it is another loss than that of one process.
    size = fsam.Outputs([middle, batch["x"]], lambda given: given[0].square().mean())
    return fsam.Heads([*linear, size], [1.0, 0.5, 0.0])


STAGED = fsam.Staged(
    lambda model, batch: model.blocks[0](looked_up(batch["x"], model.embedding)),
    lambda model, x, batch: LinearHead(model.blocks[1](x), model.embedding, batch["y"]),
)

BLOCKS = fsam.Blocks(2, r"^blocks\.(\d+)\.(up|down|scale)$", r"^nothing$", r"^embedding$", r"scale")


def batch_of(step: int, micro: int, rank: int | None, kind: str = "ddp") -> MicroBatches:
    """The step's micro-batches, or a rank's part of each; later rows have fewer targets."""
    parts = PARTS.get(kind, RANKS)
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randint(0, V, (2, ROWS, L), generator=generator).unbind()
    y = torch.where(torch.rand(ROWS, L, generator=generator) < torch.linspace(1.1, 0.1, ROWS)[:, None], y, -1)
    found = []
    for one_x, one_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
        rows, which = len(one_x) // parts, 0 if rank is None else rank * parts // RANKS
        here = slice(None) if rank is None else slice(which * rows, (which + 1) * rows)
        found.append({"x": one_x[here], "y": one_y[here]})
    return MicroBatches(found)


def captured(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend of torch.compile that runs the captured graphs as they are, forwards and backwards, and counts."""
    run = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def counted(*args: Any) -> Any:
        COMPILED["runs"] += 1
        return run(*args)

    COMPILED["graphs"] += 1
    return counted


def wrapped(kind: str, tied: bool = True) -> nn.Module:
    model = Model(tied)
    if kind == "one":
        return model
    if kind.endswith("-compiled"):
        kind = kind.removesuffix("-compiled")
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend=captured, fullgraph=True)
    if kind.startswith("ddp"):
        options = {"ddp-views": "gradient_as_bucket_view", "ddp-unused": "find_unused_parameters"}
        options["ddp-static"] = "static_graph"
        return nn.parallel.DistributedDataParallel(model, **({options[kind]: True} if kind in options else {}))
    shape, names = ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((RANKS,), ("shard",))
    if kind in PARTS:
        shape, names = (PARTS[kind], RANKS // PARTS[kind]), ("data", "tensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    if kind in PARTS:
        cut(model, mesh["tensor"])
        mesh = mesh["data"]
    if kind == "tensor":
        return model
    if kind.endswith("-remat"):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def cut(model: Model, mesh: Any) -> None:
    """Shards the vocabulary and the hidden units of the first block's MLP over the mesh; the rest is replicated."""
    block = model.blocks[0]
    for module, name, axis in ((model, "embedding", 0), (block, "up", 1), (block, "down", 0)):
        whole = getattr(module, name).detach()
        setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)])))


def made(case: Case, kind: str, of: Any = features) -> Step:
    model = wrapped(kind, case.tied)
    adamw = torch.optim.AdamW if case.foreign else fsam.AdamW
    optimizer = adamw(model.parameters(), lr=0.01, eps=1e-4)
    return Step(
        model,
        optimizer,
        case.method,
        features=STAGED if case.staged else several if case.heads else of,
        clip_norm=case.clip,
        schedule=case.schedule,
        blocks=BLOCKS if case.staged else None,
        sync=case.sync,
    )


def whole(x: Any) -> torch.Tensor:
    """A tensor as one process has it."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def trained(case: Case, kind: str, steps: int, rank: int | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(weights, then gradients of one more batch; a row of figures for each step)."""
    step = made(case, kind)
    rows = []
    for index in range(steps):
        loss = step(batch_of(index, case.micro, rank, kind))
        info = step.info
        rows.append([float(loss), info.loss, info.weight, info.base_norm, info.grad_norm, info.perturbation_norm])
    weights = [whole(p) for p in step.model.parameters()]
    step.gradient(batch_of(steps, case.micro, rank, kind))
    gradients = [whole(p.grad) for p in step.model.parameters()]
    return [*weights, *gradients], torch.tensor(rows, dtype=torch.float64).nan_to_num(-1)


def compared(name: str, kind: str, steps: int, rank: int) -> dict[str, float]:
    """Relative distances from the run of one process, the largest of any tensor and of any figure."""
    COMPILED.clear()
    tensors, rows = trained(CASES[name], kind, steps, rank)
    if kind.endswith("-compiled"):
        assert COMPILED["graphs"] <= 4 <= steps <= COMPILED["runs"], COMPILED
    expected, expected_rows = alone(name, steps)
    apart = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(tensors, expected, strict=True)]
    figures = ((rows - expected_rows).abs() / expected_rows.abs().clamp(min=1e-6)).max()
    half = len(apart) // 2
    return {"weights": max(apart[:half]), "gradients": max(apart[half:]), "figures": float(figures)}


@functools.cache
def alone(name: str, steps: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The run of one process."""
    return trained(CASES[name], "one", steps, None)


def counted(case: Case, kind: str, rank: int) -> dict[str, Any]:
    """The collectives of one step, after two steps that set things up."""
    step = made(case, kind)
    for index in range(2):
        step(batch_of(index, case.micro, rank, kind))
    with Collectives() as seen:
        step(batch_of(2, case.micro, rank, kind))
    return {"counts": dict(seen.counts), "bytes": dict(seen.bytes)}


def prepare(cases: list[str]) -> None:
    """What the ranks need alike, once, before this process is forked into them."""
    torch.compile(torch.nn.Identity())  # its import takes a second
    for kind, name, *more in (case.split(":") for case in cases):
        if kind != "run" and more != ["count"]:
            alone(name, int(*more) if more else STEPS)


def one_process(rank: int, store: str, results: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
    found: dict[str, Any] = {}
    for name in cases:
        kind, of, *more = name.split(":")
        try:
            if kind == "run":
                found[name] = EXTRA[of](rank)
            elif more == ["count"]:
                found[name] = counted(CASES[of], kind, rank)
            else:
                found[name] = compared(of, kind, int(*more) if more else STEPS, rank)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, found)
    if rank == 0:
        results.write_text(json.dumps(every))
    dist.destroy_process_group()
