"""What four gloo processes do besides training: errors, skipped steps, refusals, state, reductions in float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ranks_run
import torch
import torch.distributed as dist
from collective_counts import Collectives
from ranks_run import ADAM, RANKS, Case, D, Model, V, batch_of, counted, features, made, trained, whole, wrapped
from torch import nn
from torch.distributed.fsdp import fully_shard

from fsam_core import torch as fsam
from fsam_core.torch import SAM, FunctionalSAM, LinearHead, Plain, Step


def local(rank: int) -> dict[str, Any]:
    """Each rank along its own gradient, against one process with each micro-batch along its own."""
    case = Case(FunctionalSAM(0.1), sync="local")
    tensors, _ = trained(case, "ddp", 5, rank)
    expected, _ = trained(Case(FunctionalSAM(0.1, ascent="micro"), micro=RANKS), "one", 5, None)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(tensors, expected, strict=True))
    steered, _ = trained(Case(FunctionalSAM(0.1)), "one", 5, None)
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(tensors, steered, strict=True))
    return {"apart": apart, "from_global": far, **counted(case, "ddp", rank)}


class Changed:
    """`features`, whose head `change` replaces."""

    def __init__(self) -> None:
        self.change: Callable[[LinearHead], LinearHead] = lambda head: head

    def __call__(self, model: Any, batch: dict) -> LinearHead:
        return self.change(features(model, batch))


def raising(kind: str, rank: int) -> dict[str, Any]:
    """A pass at the perturbed weights that raises on every rank, and the step after it."""
    changed, calls = Changed(), []
    step = made(Case(FunctionalSAM(0.1)), kind, changed)
    step(batch_of(0, 1, rank, kind))
    before = [whole(p) for p in step.model.parameters()]

    def broken(head: LinearHead) -> LinearHead:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("broken")
        return head

    changed.change = broken
    raised = False
    try:
        step(batch_of(1, 1, rank, kind))
    except ValueError:
        raised = True
    after = [whole(p) for p in step.model.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(batch_of(1, 1, rank, kind))
    expected = trained(Case(FunctionalSAM(0.1)), kind, 2, rank)[0]
    resumes = all(torch.equal(whole(p), x) for p, x in zip(step.model.parameters(), expected, strict=False))
    return {"raised": raised, "same": same, "resumes": resumes}


def not_finite(kind: str, rank: int) -> dict[str, Any]:
    """One rank's forward pass at θ, or at θ+ε, overflows: all ranks skip the step, or their models would differ."""
    found = {}
    for where in (1, 2):
        changed, calls = Changed(), []
        step = made(Case(SAM(0.1, **ADAM), clip=0.1), kind, changed)
        step(batch_of(0, 1, rank, kind))
        before = [whole(p) for p in step.model.parameters()]

        def overflowing(head: LinearHead) -> LinearHead:
            calls.append(1)
            bad = rank == 2 and len(calls) == where
            return dataclasses.replace(head, hidden=head.hidden * (float("inf") if bad else 1.0))

        changed.change = overflowing
        step(batch_of(1, 1, rank, kind))
        same = all(torch.equal(a, whole(b)) for a, b in zip(before, step.model.parameters(), strict=True))
        found[str(where)] = [step.info.skipped, same, step.skipped_steps]
    return found


def evaluated(rank: int) -> dict[str, Any]:
    loss = fsam.mean_loss(features)
    (mine,), (every,) = batch_of(0, 1, rank), batch_of(0, 1, None)
    return {"apart": [abs(float(loss(wrapped(k), mine)) / float(loss(Model(), every)) - 1) for k in ("ddp", "fsdp")]}


def refused(rank: int) -> dict[str, Any]:
    """The error sentence of each set-up that is refused."""

    def said(function: Any) -> str:
        try:
            function()
        except fsam.UserError as error:
            return str(error)
        return ""

    def no_root() -> None:
        model = Model()
        fully_shard(model.blocks[0])
        Step(model, fsam.AdamW(model.parameters()), Plain(), features=features)

    def resharded() -> None:
        model = wrapped("fsdp")
        model.set_reshard_after_forward(True)
        Step(model, fsam.AdamW(model.parameters()), Plain(), features=features)(batch_of(0, 1, rank))

    def own_group() -> None:
        model = Model()
        model.head = fully_shard(nn.Linear(D, V, bias=False))
        fully_shard(model)
        of = lambda model, batch: LinearHead(model(batch["x"]), model.head.weight, batch["y"])
        Step(model, fsam.AdamW(model.parameters()), Plain(), features=of)(batch_of(0, 1, rank))

    def with_copies() -> None:
        model = wrapped("fsdp")
        copies = {p.detach().clone(): p for p in model.parameters()}
        Step(model, fsam.AdamW(copies, copies=copies), Plain(), features=features)

    def no_sync() -> None:
        step = made(Case(SAM(0.1)), "ddp")
        with step.model.no_sync():
            step.gradient(batch_of(0, 1, rank))

    def no_gradient_sync() -> None:
        step = made(Case(SAM(0.1)), "fsdp")
        step.model.set_requires_gradient_sync(False)
        step.gradient(batch_of(0, 1, rank))

    made_local = lambda: made(Case(SAM(0.1), sync="local"), "fsdp")
    made_wrong = lambda: made(Case(SAM(0.1), sync="each"), "ddp")
    compiled = lambda: Step(torch.compile(wrapped("ddp")), made_ddp.optimizer, Plain(), features=features)
    made_ddp = made(Case(Plain()), "ddp")
    cases = {"local": made_local, "sync": made_wrong, "no root": no_root, "resharded": resharded, "own": own_group}
    cases |= {"copies": with_copies, "compiled": compiled, "no_sync": no_sync, "gradient sync": no_gradient_sync}
    return {name: said(one) for name, one in cases.items()}


def remembered(rank: int) -> dict[str, Any]:
    """A step's own state is sharded as the weights are, and loads again."""
    case = Case(SAM(0.1, ascent="previous"))
    step = made(case, "fsdp")
    step(batch_of(0, 1, rank))
    state, other = step.state_dict(), made(case, "fsdp")
    other.load_state_dict(state)
    other.model.load_state_dict(step.model.state_dict())
    other.optimizer.load_state_dict(step.optimizer.state_dict())
    losses = [float(one(batch_of(1, 1, rank))) for one in (step, other)]
    shards = [tuple(x.to_local().shape) == tuple(x.shape) for x in state["previous"].values()]
    return {"losses": losses, "whole": sum(shards)}


def wide(rank: int) -> dict[str, Any]:
    """A bfloat16 model's gradients with `reduce_upcast`: summed over ranks in float32 and rounded once."""
    grads = {}
    for kind in ("one", "ddp"):
        model = Model().to(torch.bfloat16)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
            model.register_comm_hook(None, fsam.reduce_upcast)
        inner, batch = getattr(model, "module", model), batch_of(0, 1, rank).batches[0]
        with Collectives() as seen:
            (model(batch["x"]) @ inner.embedding.T).float().square().mean().backward()
        grads[kind] = [p.grad for p in inner.parameters()]
    expected = [x.float() / RANKS for x in grads["one"]]
    for x in expected:
        dist.all_reduce(x)
    same = all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(grads["ddp"], expected, strict=True))
    return {"same": same, "bytes": seen.bytes["allreduce_"]}


def beside_masters(rank: int) -> dict[str, Any]:
    """An exact step over two micro-batches with masters, in DistributedDataParallel and alone."""
    found = {}
    for kind in ("ddp", "one"):
        model = Model()
        copies = fsam.masters(model, torch.float32)  # no rounding between
        optimizer = fsam.AdamW(copies, lr=0.01, eps=1e-6, copies=copies)
        wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
        step = Step(wrapped, optimizer, fsam.FunctionalSAM(rho=0.1), features=features, clip_norm=1.0)
        with Collectives() as seen:
            step(batch_of(0, 2, rank if kind == "ddp" else None))
        found[kind] = torch.cat([master.detach().flatten() for master in copies])
        if kind == "ddp":
            counts, sent = dict(seen.counts), dict(seen.bytes)
    apart = float((found["ddp"] - found["one"]).norm() / found["one"].norm())
    return {"apart": apart, "counts": counts, "bytes": sent["allreduce_"]}


ranks_run.EXTRA |= {
    "beside-masters": beside_masters,
    "local": local,
    "raising-ddp": functools.partial(raising, "ddp"),
    "raising-fsdp": functools.partial(raising, "fsdp"),
    "not-finite-ddp": functools.partial(not_finite, "ddp"),
    "not-finite-fsdp": functools.partial(not_finite, "fsdp"),
    "evaluated": evaluated,
    "refused": refused,
    "remembered": remembered,
    "wide": wide,
}
