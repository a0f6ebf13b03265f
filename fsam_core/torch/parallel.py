"""The processes that train one model together: DistributedDataParallel, FSDP2 (`fully_shard`) and tensor parallelism.

The first two average gradients over their ranks. A loss that each rank divides by the ranks' mean token weight is
therefore the mean over all target tokens of all ranks, however many each has. Under FSDP2 a parameter is a DTensor, of
which a rank holds a shard: the work on parameters is done on shards, and a norm takes one reduction of a few scalars.

Ranks along a mesh axis for tensor parallelism have the same tokens and parts of some weights. Means over them change
nothing, and norms count once what all of them hold. Both are reduced over the ranks of all axes at once, so that every
rank clips, perturbs and skips by the same numbers.

`features` is called inside the wrapper's forward pass, because its hooks run there, and with the module that was
wrapped: as in one process it may call the model, or parts of it, or read its head's weight.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.torch import heads
from fsam_core.torch.dtensor import local
from fsam_kernels.torch.preconditioned_norm import norm_of

Sync = Literal["global", "local"]
BUCKET_BYTES = 2**28  # of small tensors that `Parallel.all_reduce_mean_` reduces together
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Parallel:
    """One process and its model: nothing is reduced.

    Attributes:
        model: as the user gave it.
        inner: the module that a wrapper holds, or the model itself; what `features` is called with.
        hooked: whether a wrapper's hooks must see each gradient as autograd makes it.
        count: how many ranks have data of their own (along tensor axes they share it).
        sharded: whether a rank holds only a part of each weight.
        reuses_gradients: whether the next pass writes its gradients over those of this one.
        reduces_accumulated: whether what `.grad` holds before a pass is reduced together with what the pass adds.
        why_not_local: why gradients cannot be each rank's own, "" where they can.
    """

    count = 1
    why_not_local = ""
    hooked = sharded = reuses_gradients = reduces_accumulated = False

    def __init__(self, model: nn.Module, inner: nn.Module | None = None) -> None:
        self.model, self.inner = model, model if inner is None else inner

    def call_features(self, features: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """What `features` returns for the batch."""
        return features(self.model, batch)

    def accumulating(self, more: bool) -> AbstractContextManager[Any]:
        """A forward and backward pass; with `more` its gradients are reduced together with those of a later one."""
        return nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks."""
        return x

    def all_reduce_sums(self, params: Sequence[Any], sums: Sequence[Tensor], each: bool) -> Sequence[Tensor]:
        """Sums over whole tensors, from those of `params`' parts: one for each, or over all without `each`."""
        return sums

    def local_norm(self, params: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        """‖·‖₂ over these parts of `params`, such that the squares of all ranks add up."""
        return norm_of(tensors)

    def norm(self, local_norm: Tensor) -> Tensor:
        """‖·‖₂ over the whole tensors, from `local_norm`."""
        return local_norm

    def local_share(self, norm: Tensor) -> Tensor:
        """The inverse of `norm`: a `local_norm` that is the same on every rank."""
        return norm

    def all_reduce_scalars(self, means: Sequence[Tensor | None], norms: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Means over all ranks and norms of the whole tensors, the same on every rank, in one reduction."""
        return [*means, *norms]

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor, replaced by its mean over all ranks; one reduction for each dtype and `BUCKET_BYTES`."""

    def reshard(self) -> None:
        """Free the whole weights that a forward pass has gathered; the next one gathers them anew."""

    def reset(self) -> None:
        """Recover from a pass that raised."""

    def check_reduces(self) -> None:
        """Check that gradients are reduced over the ranks.

        Raises:
            UserError: within a wrapper's own accumulation.
        """


class _Group(Parallel):
    hooked = True

    def __init__(self, model: nn.Module, inner: nn.Module, group: Any) -> None:
        super().__init__(model, inner)
        self.group = group
        self.count = self.size = dist.get_world_size(group)

    def mean(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x / self.size

    def all_reduce_scalars(self, means: Sequence[Tensor | None], norms: Sequence[Tensor | None]) -> list[Tensor | None]:
        given = [*means, *(norms if self.sharded else ())]
        present = [x for x in given if x is not None]
        upcast = torch.stack([x.detach().to(present[0].device, torch.float64) for x in present])
        at = sum(x is not None for x in means)
        upcast[at:].square_()
        upcast[:at].div_(self.size)
        dist.all_reduce(upcast, group=self.group)
        upcast[at:].sqrt_()
        values = iter(upcast)
        found = [None if x is None else next(values).to(x.dtype) for x in given]
        return found if self.sharded else [*found, *norms]


class DataParallel(_Group):
    """A model in DistributedDataParallel: every rank has all of it, and after a backward pass the same gradients."""

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        super().__init__(model, model.module, model.process_group)
        self.reuses_gradients = bool(model.gradient_as_bucket_view)
        if model.static_graph:  # its first step must reduce, and what is reduced twice is the same
            self.why_not_local = "which DistributedDataParallel with static_graph=True always reduces"
        # Where it looks for parameters that a pass did not reach, it leaves their gradients as they are.
        self.reduces_accumulated = not (model.static_graph or model.find_unused_parameters)

    def call_features(self, features: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        ddp, inner = self.model, self.inner
        made: list[Any] = []

        class Features(nn.Module):
            """Stands in the wrapper for the module, until it is called."""

            def named_buffers(self, *arguments: Any, **options: Any) -> Any:
                return inner.named_buffers(*arguments, **options)  # those that the wrapper broadcasts

            def forward(self, batch: Any) -> tuple[Tensor, ...]:
                ddp.module = inner
                made.append(features(inner, batch))
                # A leaf is not found by find_unused_parameters, which would count the head's weight as unused.
                return tuple(x.view_as(x) if x.is_leaf else x for x in heads.outputs(made[0]))

        try:
            ddp.module = Features()
            outputs = ddp(batch)
        finally:
            ddp.module = inner
        return heads.with_outputs(made[0], outputs)

    def accumulating(self, more: bool) -> AbstractContextManager[Any]:
        return self.model.no_sync() if more and not self.why_not_local else nullcontext()  # type: ignore[operator]

    def check_reduces(self) -> None:
        if not self.model.require_backward_grad_sync:
            raise _unreduced("no_sync() of DistributedDataParallel")

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            for some in _buckets([x for x in tensors if x.dtype == dtype]):
                whole = torch.cat([x.reshape(-1) for x in some])
                dist.all_reduce(whole, group=self.group)
                whole /= self.size
                for x, piece in zip(some, whole.split([x.numel() for x in some]), strict=True):
                    x.copy_(piece.view_as(x))


class _Shards(_Group):
    """Weights of which a rank may hold a part: the work is done on parts, and norms are summed over the ranks."""

    sharded = True

    def __init__(self, model: nn.Module, group: Any) -> None:
        super().__init__(model, model, group)
        self._replicas: dict[Any, int] = {}

    def all_reduce_sums(self, params: Sequence[Any], sums: Sequence[Tensor], each: bool) -> Sequence[Tensor]:
        factor = torch.tensor([1 / self.replicas(p) for p in params], dtype=sums[0].dtype)
        whole = torch.stack(list(sums)) * factor.to(sums[0].device, non_blocking=True)
        whole = whole if each else whole.sum(1)
        dist.all_reduce(whole, group=self.group)
        return whole.unbind()

    def local_norm(self, params: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        by_count: dict[int, list[Tensor]] = {}
        for p, x in zip(params, tensors, strict=True):
            by_count.setdefault(self.replicas(p), []).append(x)
        norms = [norm_of(some) / math.sqrt(count) for count, some in by_count.items()]
        return norms[0] if len(norms) == 1 else norm_of(norms)

    def replicas(self, p: Any) -> int:
        """How many ranks hold the same part of p."""
        if p not in self._replicas:
            self._replicas[p] = self.size
            if hasattr(p, "to_local"):
                sizes = zip(p.device_mesh.shape, p.placements, strict=True)
                self._replicas[p] //= math.prod(size for size, placement in sizes if not placement.is_replicate())
        return self._replicas[p]

    def norm(self, local_norm: Tensor) -> Tensor:
        square = local_norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def local_share(self, norm: Tensor) -> Tensor:
        return norm / math.sqrt(self.size)


class TensorParallel(_Shards):
    """A model with DTensors on a mesh of tensor ranks, and no wrapper: they hold a part of each weight, or all of it.

    No gradient has to be reduced. That of a part is whole, and that of a weight which each rank has is the same on all,
    since what reaches it, h̄ and DTensor's own sums, has been summed over the ranks.
    """

    hooked = False

    def __init__(self, model: nn.Module, group: Any) -> None:
        super().__init__(model, group)
        self.count = 1

    def mean(self, x: Tensor) -> Tensor:
        return x


class Sharded(_Shards):
    """A model under `fully_shard`, itself the root: a rank has a shard of each weight, gradient and moment.

    The mesh may have tensor axes beside FSDP2's own; some weights are then cut along them, too.
    """

    why_not_local = "of which FSDP2 keeps nothing"

    def __init__(self, model: nn.Module, mesh: Any) -> None:
        if mesh.ndim == 1:
            group = mesh.get_group()
        else:
            group = dist.group.WORLD if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()
        super().__init__(model, group)
        from torch.distributed.fsdp import FSDPModule

        self._modules: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._data_mesh = next(iter(filter(None, map(_data_mesh, self._modules))))
        self.count = self._data_mesh.size()
        self._replicates = self._data_mesh.ndim > 1

    def call_features(self, features: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        root, made = self.model, []
        own = root.__dict__.get("forward")  # a caller's, as Accelerate's autocast

        def restore() -> None:
            root.__dict__.pop("forward", None)
            root.__dict__.update({} if own is None else {"forward": own})

        def forward(batch: Any) -> tuple[Tensor, ...]:
            # Once inside, the root is an ordinary module: a call of it must not begin another forward of FSDP's.
            restore()
            hooks = root._forward_pre_hooks, root._forward_hooks
            root._forward_pre_hooks, root._forward_hooks = OrderedDict(), OrderedDict()
            try:
                made.append(features(root, batch))
            finally:
                root._forward_pre_hooks, root._forward_hooks = hooks
            return heads.activations(made[0])

        root.forward = forward
        try:
            found = root(batch)
        finally:
            restore()
        head = heads.with_activations(made[0], found)
        for linear in heads.linear_heads(head):
            self._check_gathered(linear.weight)
            self._check_gathered(linear.bias)
        return head

    def _check_gathered(self, x: Any) -> None:
        if x is None:
            return
        if hasattr(x, "to_local") and _share_an_axis(x.device_mesh, self._data_mesh):
            raise UserError(
                "features: the head's weight is a shard; leave its module to the root, without a fully_shard of its own"
            )
        part = local(x)
        if part.numel() and not part.untyped_storage().size():
            raise UserError("features: the head's weight is resharded after forward; fully_shard the root without that")

    def accumulating(self, more: bool) -> AbstractContextManager[Any]:
        """Shards are reduced each time, since whole gradients would undo the sharding; between replicas once."""
        if self._replicates:
            self.model.set_requires_all_reduce(not more)  # type: ignore[operator]
        return nullcontext()

    def reshard(self) -> None:
        for module in self._modules:
            module.reshard()

    def check_reduces(self) -> None:
        if not all(group.reduce_grads for module in self._modules for group in _groups(module)):
            raise _unreduced("set_requires_gradient_sync(False)")

    def reset(self) -> None:
        if hasattr(self.model, "reset_iter_state"):  # from PyTorch 2.13 on
            self.model.reset_iter_state()  # type: ignore[operator]


def detect_parallelism(model: nn.Module) -> Parallel:
    """The ranks that the model was wrapped for.

    Raises:
        UserError: for a wrapper that is not known, or a sharded model that is not FSDP2's root.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Parallel(model)
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    compiled = getattr(model, "_orig_mod", model)
    if isinstance(compiled, FullyShardedDataParallel):
        raise UserError("model: FullyShardedDataParallel is FSDP's first version; use fully_shard of the same module")
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if compiled is not model and (meshes or isinstance(compiled, nn.parallel.DistributedDataParallel)):
        raise UserError("model: compile it before it is wrapped for several ranks, or its blocks; not the wrapper")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return DataParallel(model)
    if not meshes:
        return Parallel(model)
    mesh = max(meshes, key=lambda mesh: mesh.ndim)
    axes = set(mesh.mesh_dim_names or ())
    if not all(one == mesh or set(one.mesh_dim_names or axes) < axes for one in meshes):
        raise UserError(f"model: its shards lie on {len(meshes)} meshes; give every fully_shard the same one")
    if isinstance(model, FSDPModule):
        return Sharded(model, mesh)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise UserError("model: it holds shards but is no root of FSDP2; call fully_shard on the model itself, too")
    if mesh.ndim > 1:
        raise UserError(
            f"model: its weights lie on a mesh of {mesh.ndim} axes and nothing averages gradients over data; lay them "
            'on the tensor axis alone and call fully_shard(model, mesh=mesh["data"])'
        )
    return TensorParallel(model, mesh.get_group())


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(x for x in name.split(".") if x not in WRAPPERS)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, together up to `BUCKET_BYTES`; one that is larger by itself."""
    bucket: list[Tensor] = []
    for x in tensors:
        if bucket and sum(y.nbytes for y in bucket) + x.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket


def _data_mesh(module: Any) -> Any:
    """The mesh that FSDP2 averages a module's gradients over, which no public function tells; None without weights."""
    return next((group.mesh_info.mesh for group in _groups(module)), None)


def _groups(module: Any) -> list[Any]:
    """FSDP2's groups of a module's own weights."""
    state = module._get_fsdp_state()
    return [x for x in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] if x is not None]


def _unreduced(what: str) -> UserError:
    return UserError(
        f"step: {what} would leave each rank its own gradients, and the perturbation differs from rank to rank; give "
        "all micro-batches to one step, as MicroBatches([b0, b1, …]), which reduces them together"
    )


def _share_an_axis(one: Any, other: Any) -> bool:
    return one == other or bool(set(one.mesh_dim_names or ()) & set(other.mesh_dim_names or ()))
