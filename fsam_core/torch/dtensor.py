"""DTensors: this rank's part of one, and back; and a head whose weight is one.

A parameter under FSDP2 or tensor parallelism is a DTensor, of which a rank holds a shard. The work on parameters is
done on shards. A head's weight that is cut along the vocabulary stays where it is; everything else of a head is whole
on each of those ranks, and the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_kernels.torch.vocabulary import Vocabulary


def local(x: Any) -> Any:
    """This rank's part of a DTensor, as a view; any other tensor as it is."""
    if not hasattr(x, "to_local"):
        return x
    with torch.no_grad():
        return x.to_local()


def local_parts(tensors: Iterable[Any]) -> list[Any]:
    """`local` of each."""
    return [local(x) for x in tensors]


def likes(params: Iterable[Any], parts: Iterable[Tensor]) -> list[Tensor]:
    """`like` of each parameter and its part."""
    return [like(p, x) for p, x in zip(params, parts, strict=True)]


def like(p: Any, x: Tensor) -> Tensor:
    """This rank's part `x` as a DTensor where p is one."""
    if not hasattr(p, "to_local") or hasattr(x, "to_local"):
        return x
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def shard_like(p: Any, whole: Tensor) -> Tensor:
    """The part of a tensor, which every rank has whole, that p's shard corresponds to; a DTensor where p is one."""
    if not hasattr(p, "to_local"):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    for axis, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        whole = whole.narrow(axis, min(offset, whole.shape[axis]), size)
    return like(p, whole.clone())


def local_head(head: Any) -> tuple[dict[str, Any], Vocabulary | None]:
    """(those tensors of a `LinearHead` that are DTensors, as plain ones, by name; the ranks that share its vocabulary).

    The plain tensors keep their graph, and the gradient of one comes back to its DTensor.

    Raises:
        UserError: for a placement that is no cut along the vocabulary, or a tensor that should be whole and is not.
    """
    given = {name: getattr(head, name) for name in ("hidden", "weight", "labels", "token_weights", "bias")}
    found = {name: x.to_local() for name, x in given.items() if hasattr(x, "to_local")}
    for name in ("hidden", "labels", "token_weights"):
        if name in found and not _is_whole(given[name]):
            raise UserError(
                f"features: {name} is a DTensor placed as {_placed(given[name])}; each rank needs all of it, so "
                "redistribute it to Replicate(), or return what to_local() gives where that is whole"
            )
    if "weight" not in found or _is_whole(head.weight):
        if "bias" in found and not _is_whole(head.bias):
            raise UserError(f"features: the head's bias is cut, {_placed(head.bias)}, and its weight is not; cut both")
        return found, None
    axis, mesh = (0 if head.layout == "VD" else 1), head.weight.device_mesh
    if mesh.ndim > 1 or not head.weight.placements[0].is_shard(axis):
        raise UserError(
            f"features: the head's weight is placed as {_placed(head.weight)} on a mesh of {mesh.ndim} axes; what "
            f"works is Shard({axis}), its vocabulary, on the mesh's one axis for tensor parallelism"
        )
    V, ranks, columns = head.weight.shape[axis], mesh.size(), found["weight"].shape[axis]
    widest = -(-V // ranks)
    start = min(mesh.get_local_rank() * widest, V)
    if columns != min(widest, V - start):
        raise UserError(
            f"features: the head's weight has {columns} of {V} vocabulary entries on rank {mesh.get_local_rank()} of "
            f"{ranks}; cut it as distribute_tensor does, {widest} to a rank while there are any"
        )
    same = "bias" in found and head.bias.device_mesh == mesh and head.bias.placements[0].is_shard(0)
    if head.bias is not None and not same:
        raise UserError("features: the head's weight is cut along the vocabulary and its bias is not; cut it likewise")
    return found, Vocabulary(mesh.get_group(), V, start, widest)


def _is_whole(x: Any) -> bool:
    return all(placement.is_replicate() for placement in x.placements)


def _placed(x: Any) -> str:
    return ", ".join(map(str, x.placements))
