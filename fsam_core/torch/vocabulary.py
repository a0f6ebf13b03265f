"""A head of DTensors: this rank's part of it, and the ranks that hold the rest of its vocabulary.

The head's weight, cut along the vocabulary over the ranks of one mesh axis, stays where it is. Everything else of a
head is whole on each of these ranks, and the same.
"""

from __future__ import annotations

from typing import Any

from fsam_core.errors import UserError
from fsam_kernels.torch.vocabulary import Vocabulary


def part(head: Any) -> tuple[dict[str, Any], Vocabulary | None]:
    """(the tensors of a `LinearHead` that are DTensors, as plain ones, by name; the ranks its vocabulary is cut over).

    They keep their graph, and a gradient of the part comes back to the DTensor as one of its placements.

    Raises:
        UserError: for a placement that is no cut along the vocabulary, or a tensor that should be whole and is not.
    """
    of = {name: getattr(head, name) for name in ("hidden", "weight", "labels", "token_weights", "bias")}
    found = {name: x.to_local() for name, x in of.items() if hasattr(x, "to_local")}
    for name in ("hidden", "labels", "token_weights"):
        if name in found and not _whole(of[name]):
            raise UserError(
                f"features: {name} is a DTensor placed as {_placed(of[name])}; each rank needs all of it, so "
                "redistribute it to Replicate(), or return what to_local() gives where that is whole"
            )
    if "weight" not in found or _whole(head.weight):
        if "bias" in found and not _whole(head.bias):
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


def _whole(x: Any) -> bool:
    return all(placement.is_replicate() for placement in x.placements)


def _placed(x: Any) -> str:
    return ", ".join(map(str, x.placements))
