"""Four gloo processes, or two and two, hold a head's vocabulary together, case by case.

    python head_ranks.py FOLDER

FOLDER/cases.pt is a list of dicts: the group's size, backend, dtype, keep, chunk bytes, and a `Problem`'s arrays.
FOLDER/found.pt gets one for each: what the operations gave with the parts of w̄ and b̄ put together, and what was sent.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import spawn
import torch
import torch.distributed as dist
from collective_counts import Collectives

import fsam_kernels.torch
import fsam_kernels.triton
from fsam_kernels.options import Loss
from fsam_kernels.torch.vocabulary import Vocabulary

RANKS = 4
OPS = {"torch": fsam_kernels.torch, "triton": fsam_kernels.triton}


def found(case: dict[str, Any], group: Any) -> dict[str, Any]:
    """One case on the ranks of a group."""
    ops, dtype, rank, ranks = OPS[case["backend"]], case["dtype"], dist.get_rank(group), dist.get_world_size(group)
    V = len(case["w"])
    widest = -(-V // ranks)
    start = min(rank * widest, V)
    vocabulary = Vocabulary(group, V, start, widest)
    give = lambda name: None if case[name] is None else case[name].to(dtype)
    mine = lambda name: None if case[name] is None else case[name][start : start + widest].to(dtype)
    options = {"chunk_bytes": case["chunk_bytes"]}
    with Collectives() as first:
        loss, lse, cotangent, base = ops.linear_cross_entropy(
            give("h"),
            mine("w"),
            case["y"],
            case["weights"].float(),
            bias_V=mine("b"),
            loss=Loss(**case["loss"]),
            gradient=True,
            keep=case["keep"],
            vocabulary=vocabulary,
            **options,
        )
    with Collectives() as second:
        moved = ops.logit_vjp(cotangent, give("h2"), mine("w2"), bias_V=mine("b2"), **options)
    again = ops.logit_vjp(cotangent, give("h"), mine("w"), bias_V=mine("b"), **options)
    results = {"loss": loss, "lse": lse, "base": base, "moved": moved, "again": again}
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, results, group=group)
    same = all(torch.equal(one[name], every[0][name]) for one in every for name in ("loss", "lse"))
    for name in ("base", "moved", "again"):
        same &= all(torch.equal(one[name].hbar_NxD, every[0][name].hbar_NxD) for one in every)
        wbar_VxD = torch.cat([one[name].wbar_VxD for one in every])
        bbar_V = None if case["b"] is None else torch.cat([one[name].bbar_V for one in every])
        results[name] = (every[0][name].hbar_NxD, wbar_VxD, *([] if bbar_V is None else [bbar_V]))
    sent = [(dict(x.counts), dict(x.bytes)) for x in (first, second)]
    return {**results, "same": same, "sent": sent, "columns": [len(one["base"][1]) for one in every]}


def one_process(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = []
    for case in torch.load(folder / "cases.pt", weights_only=False):
        try:
            results.append(found(case, dist.group.WORLD if case["ranks"] == RANKS else pairs[rank // 2]))
        except (IndexError, RuntimeError, ValueError) as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, [one.get("error", "") for one in results])
    for one, *errors in zip(results, *every, strict=True):
        one["errors"] = errors
    if rank == 0:
        torch.save(results, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(spawn.fork_ranks(RANKS, one_process, Path(sys.argv[1])))
