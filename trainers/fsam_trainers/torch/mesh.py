"""The sharding of a run's tensors: FSDP2 along "data" and "fsdp", DTensors along "tensor".

A parameter that is cut over the tensor axis is a DTensor, also while a block computes; activations are plain tensors,
of which a rank has its own heads, or hidden units, between `entering` and `leaving`. The ranks of a tensor group are
neighbours, so that they share a host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fsam_core import UserError
from fsam_trainers import placement
from fsam_trainers.config import Settings
from fsam_trainers.data.batches import check_rows

# The dimension of a parameter that the tensor axis shards. qkv is [D, 3 A], three matrices side by side: shards along
# 3 A would not be whole heads. It is therefore stored sharded along D, and `own_heads` reshards it by heads; so is kv.
_CUTS = {"embedding": 0, "head": 0, "head_bias": 0, "qkv": 0, "q": 1, "kv": 0, "attention_out": 0}
_CUTS |= {"mlp_gate": 1, "mlp_in": 1, "mlp_out": 0}


def is_sharded(settings: Settings) -> bool:
    """Whether a rank may hold only a part of a weight."""
    return settings.fsdp > 1 or settings.tensor_parallel > 1


def check(settings: Settings, count: int) -> None:
    """
    Raises:
        UserError: for a mesh or a batch that does not go with that many ranks.
    """
    placement.check_ranks(settings, count)
    if settings.sync == "local" and math.prod(placement.sizes(settings).values()) != count:
        raise UserError(f"--sync local: the number of replicas is part of the method; give --data-parallel {count}")
    if settings.tensor_parallel > 1:
        for name in ("biases", "qkv_biases"):
            if getattr(settings.model, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"--tensor-parallel: in torch a model with {option} is not cut; give --fsdp, or use jax"
                )
        placement.check_model(settings)
    check_rows(settings.batch, settings.micro_batches, count // settings.tensor_parallel)


def shard(model: nn.Module, settings: Settings, device: str, count: int) -> None:
    """Shard the model in place: its matrices over the tensor axis, then FSDP2 of each block and of the rest.

    With `--tensor-parallel` alone FSDP2 has groups of one rank: it then keeps float32 masters of rounded weights.
    """
    policy = MixedPrecisionPolicy()
    if settings.dtype != "float32":
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, settings.dtype), reduce_dtype=torch.float32)
    fsdp, tensor = settings.fsdp, settings.tensor_parallel
    sizes = {"data": count // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
    axes = tuple(axis for axis, size in sizes.items() if size > 1 or axis == "fsdp")
    mesh = init_device_mesh(device, tuple(sizes[axis] for axis in axes), mesh_dim_names=axes)
    if tensor > 1:
        _cut(model, mesh["tensor"])
    rows = mesh[tuple(axis for axis in axes if axis in placement.ROWS)] if len(axes) > 1 else mesh
    for block in model.children():
        fully_shard(block, mesh=rows, mp_policy=policy)
    fully_shard(model, mesh=rows, mp_policy=policy)


def _cut(model: nn.Module, mesh: Any) -> None:
    for module in (model, *model.children()):
        for name, p in list(module.named_parameters(recurse=False)):
            if name in _CUTS:  # nothing is sent: every rank has drawn the same weights
                part = distribute_tensor(p.detach(), mesh, [Shard(_CUTS[name])], src_data_rank=None)
                setattr(module, name, nn.Parameter(part))


# --- inside the model -------------------------------------------------------------------------------------------------


def looked_up(tokens_N: Tensor, embedding_VxD: DTensor) -> Tensor:
    """Rows of an embedding that is sharded over the tensor ranks by vocabulary."""
    whole = DTensor.from_local(tokens_N, embedding_VxD.device_mesh, [Replicate()], run_check=False)
    rows: Any = F.embedding(whole, embedding_VxD)
    return rows.redistribute(placements=[Replicate()]).to_local()


def entering(x_NxD: Tensor, w: Tensor) -> Tensor:
    """A replicated activation before each tensor rank multiplies it by its shard of w: x̄ is summed over the ranks."""
    if not isinstance(w, DTensor):
        return x_NxD
    whole = DTensor.from_local(x_NxD, w.device_mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def leaving(x_NxD: Tensor, w: Tensor) -> Tensor:
    """The sum over the tensor ranks of their products with their shards of w."""
    if not isinstance(w, DTensor):
        return x_NxD
    part = DTensor.from_local(x_NxD, w.device_mesh, [Partial()], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local()


def own(w: Tensor) -> Tensor:
    """This tensor rank's shard of a parameter."""
    return w.to_local() if isinstance(w, DTensor) else w


def own_heads(w_DxE: Tensor, parts: int) -> Tensor:
    """The columns of this tensor rank's heads in so many matrices side by side, concatenated."""
    if not isinstance(w_DxE, DTensor):
        return w_DxE
    D = w_DxE.shape[0]
    by_matrix: Any = w_DxE.view(D, parts, -1)
    return by_matrix.redistribute(placements=[Shard(2)]).to_local().reshape(D, -1)
