"""The passes of a step in PyTorch: gradients into `.grad`, cotangents kept for another pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fsam_core.errors import UserError
from fsam_core.regions import in_torch
from fsam_core.torch import heads, rng
from fsam_core.torch.heads import FlatHead, LinearHead, Logits
from fsam_core.torch.parallel import Ranks, like, local
from fsam_kernels.memory import Memory

Features = Callable[[nn.Module, Any], "LinearHead | Logits"]


@dataclass(frozen=True)
class Staged:
    """A model in two stages, so that what no perturbation moves is run once for both passes.

    With a scope that holds nothing of the lower stage (`scope="top:K"` with a prefix that ends where those blocks
    begin) its activations are shared, and the exact method runs it backwards once.

    Attributes:
        prefix: (model, batch) -> the lower stage's output: a tensor or a tree of tensors, those with a graph float.
        suffix: (model, that output, batch) -> `LinearHead` or `Logits`.
    """

    prefix: Callable[[nn.Module, Any], Any]
    suffix: Callable[[nn.Module, Any, Any], LinearHead | Logits]

    def __call__(self, model: nn.Module, batch: Any) -> LinearHead | Logits:
        return self.suffix(model, self.prefix(model, batch), batch)


class Kept(NamedTuple):
    """What the second pass needs of a micro-batch: z̄, what it was divided by, and the random state it began with."""

    cotangent: Any
    unit: Tensor
    rng_state: rng.State


class Passed(NamedTuple):
    """A pass over some micro-batches: their mean loss, their weight, and what was kept of each.

    Of several ranks the losses are such that their mean is that over all ranks, and the weight is the ranks' mean.
    """

    loss: Tensor
    weight: Tensor
    kept: list[Kept]


class Passes:
    """A model's passes under one backend, memory budget and pairing of the optimizer's tensors with the model's.

    Attributes:
        ranks: the processes that take the step together.
        apart: whether the ranks' gradients are left to differ, to be reduced after the last pass.
        copies: tensor of the optimizer -> the model's parameter that is cast from it; empty where they are the same.
        stale: whether the copies may hold θ+ε.
        loss_scale: what cotangents are multiplied by until they are the masters' gradients.
    """

    def __init__(
        self,
        ops: ModuleType,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        features: Features,
        memory: Memory,
        copies: dict[Tensor, nn.Parameter],
    ) -> None:
        self.ops, self.ranks, self.optimizer, self.memory, self.copies = ops, ranks, optimizer, memory, copies
        self.model, self.features = ranks.inner, features
        self.stale = self.apart = False
        self.loss_scale = 1.0
        self._head: tuple[Tensor | None, ...] | None = None
        self._room: dict[Any, Tensor] = {}

    # --- gradients ----------------------------------------------------------------------------------------------------

    def params(self) -> list[Any]:
        """The optimizer's tensors that have a gradient at the moment."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def gradients(self) -> dict[Any, Tensor]:
        """Their gradients; of what is sharded, this rank's part. Written in place they are written where they are."""
        return {p: local(p.grad) for p in self.params()}

    def held(self, gradients: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """The same, such that another pass leaves them as they are."""
        if not self.ranks.reuses_gradients:
            return gradients
        return {p: x.clone() for p, x in gradients.items()}

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def put(self, gradients: dict[Any, Tensor]) -> None:
        """These as the optimizer's tensors' gradients, and no others."""
        self.clear()
        for p, gradient in gradients.items():
            p.grad = like(p, gradient)

    def collect(self) -> None:
        """Add the compute weights' gradients to the masters', in the masters' dtype, where there are masters."""
        for master, p in self.copies.items():
            if p.grad is not None:
                wide = p.grad.to(master.dtype)
                if self.loss_scale != 1:
                    wide.mul_(1 / self.loss_scale)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                p.grad = None

    # --- passes -------------------------------------------------------------------------------------------------------

    def base(
        self,
        batches: Sequence[Any],
        *,
        backward: bool = True,
        cut: str | None = None,
        replay: Sequence[Kept] | None = None,
        region: str = "base",
        onto: Passed | None = None,
    ) -> Passed:
        """Loss and z̄ of every micro-batch at the present weights; with `backward`, Jᵀ z̄ into `.grad`.

        `cut` is where z̄ is held for a second pass, None if there is none. At the "hidden" states it is the cotangents
        of the head's inputs, and those of its weight and bias are summed in the first micro-batch's. With `replay` the
        random draws are those of an earlier pass over the first of these micro-batches. With `onto`, an earlier pass
        whose gradients are in `.grad`, the result is of the micro-batches of both; what the ranks have of them is
        summed in that pass's units, and reduced together.
        """
        if backward and onto is None:
            self.clear()
        seen: list[tuple[Tensor, Tensor, Kept]] = []
        # Of several ranks it has been agreed upon in the pass that is replayed.
        unit = replay[0].unit if replay and self.ranks.count > 1 else onto.kept[0].unit if onto else None
        for i, batch in enumerate(batches):
            if replay is not None and i < len(replay):
                rng.restore(replay[i].rng_state)
            before = rng.state(self.model)
            with self._accumulating(i, len(batches), backward):
                with torch.set_grad_enabled(backward), in_torch(_named(region, "forward")):
                    head = heads.flat(self.ranks.head(self.features, batch))
                with in_torch(_named(region, "backward" if backward else "forward")):
                    one = self.head(head, unit, len(batches), cut=cut, backward=backward, before=before)
            unit = one[2].unit
            if cut == "hidden" and seen:
                first = seen[0][2].cotangent
                for total, more in zip(first[1:], one[2].cotangent[1:], strict=True):
                    total.add_(more)
                one = (*one[:2], one[2]._replace(cotangent=one[2].cotangent[:1]))
            seen.append(one)
        if backward:
            self._reduce(len(batches))
        return self._mean(seen, backward, onto)

    def head(
        self,
        head: FlatHead | Logits,
        unit: Tensor | None,
        micro_batches: int,
        *,
        cut: str | None,
        backward: bool,
        before: rng.State,
    ) -> tuple[Tensor, Tensor, Kept]:
        """(loss, weight, z̄) of one micro-batch; with `backward`, pulled back into `.grad`."""
        weight = heads.weight(head)
        # Everything is summed in units of the first micro-batch's weight, so that half floats do not overflow; with one
        # micro-batch that is the mean already. Of several ranks it is their mean weight, as they average gradients.
        if unit is None:
            all_ranks = self.ranks.mean(weight)
            unit = torch.where(all_ranks > 0, all_ranks, 1)
            weight = all_ranks if micro_batches == 1 else weight
        if cut == "hidden" and isinstance(head, Logits):
            raise UserError("cut: 'hidden' needs features to return a LinearHead, got Logits")
        holds = cut == "logits" and heads.keeps(head, micro_batches, self.memory)
        wanted = backward or cut == "hidden"
        in_place = backward and self._in_place(head)
        onto = heads.summed(head) if in_place and cut != "hidden" else None  # what is kept is of this pass alone
        loss, cotangent, out = heads.cotangent(
            self.ops, head, unit / self.loss_scale, self.memory, gradient=wanted, keep=holds, onto=onto
        )
        loss = loss / self.loss_scale
        if cut == "hidden":
            cotangent = out
        elif cut is not None:
            cotangent = self._detached(cotangent)
        if backward:
            assert out is not None
            heads.backward(head, out, in_place=in_place, own=cut != "hidden")
            self.collect()
        return loss, weight, Kept(cotangent, unit, before)

    def _detached(self, cotangent: Any) -> Any:
        """The cotangent with a head that nobody writes over: what it is recomputed from is the head it was made at.

        Beside masters the model's weights are written in place, and of shards the whole is gathered for a pass, so the
        head is copied there, once for all micro-batches.
        """
        if not (self.copies or self.ranks.sharded) or getattr(cotangent, "w_VxD", None) is None:
            return cotangent
        if self._head is None:
            self._head = tuple(None if x is None else x.clone() for x in (cotangent.w_VxD, cotangent.bias_V))
        return dataclasses.replace(cotangent, w_VxD=self._head[0], bias_V=self._head[1])

    def _mean(self, seen: Sequence[tuple[Tensor, Tensor, Kept]], backward: bool, onto: Passed | None) -> Passed:
        losses, weights, kept = zip(*seen, strict=True)
        if len(seen) == 1 and onto is None:
            return Passed(losses[0], weights[0], [kept[0]])
        total = self.ranks.mean(torch.stack(weights).sum())
        if onto is not None:
            losses, total = (onto.loss, *losses), onto.weight + total
        factor = kept[0].unit / torch.where(total > 0, total, 1)
        if backward:
            for gradient in self.gradients().values():
                gradient.mul_(factor.to(gradient))
        return Passed(torch.stack(losses).sum() * factor, total, [rescaled(k, factor) for k in kept])

    def pull_back(
        self,
        batches: Sequence[Any],
        kept: Sequence[Kept],
        onto: dict[Any, Tensor] | None = None,
        region: str = "second",
    ) -> None:
        """Jᵀ z̄ into `.grad`: the Jacobian at the present weights, cotangents from anywhere. No logits, no loss.

        It is added to `onto`, whose tensors become the gradients: no pass and no memory of its own for that sum. Of
        several ranks the mean is then that of both: `onto` is the same on all of them, or each rank's own.
        """
        self.put(onto or {})
        for i, (batch, base) in enumerate(zip(batches, kept, strict=True)):
            rng.restore(base.rng_state)
            with self._accumulating(i, len(batches)):
                with in_torch("second forward"):
                    head = heads.flat(self.ranks.head(self.features, batch))
                with in_torch("second backward"):
                    self.pull_back_head(head, base.cotangent)
        self._reduce(len(batches))

    def pull_back_head(self, head: FlatHead | Logits, zbar: Any) -> None:
        """One micro-batch's cotangent, added to what is in `.grad`."""
        in_place = self._in_place(head)
        onto = heads.summed(head) if in_place else None
        out = heads.pulled_back(self.ops, head, zbar, self.memory, onto)
        heads.backward(head, out, in_place=in_place, own=not isinstance(zbar, tuple))
        self.collect()

    def _in_place(self, head: FlatHead | Logits) -> bool:
        """Whether the head's weight gets its gradient without autograd; wrappers of several ranks wait for it there."""
        return self.ranks.alone and heads.sums_in_place(head)

    def _accumulating(self, i: int, count: int, backward: bool = True) -> AbstractContextManager[None]:
        """Micro-batch i of a pass over so many; the gradients of all are reduced with the last one's, or after it."""
        return self.ranks.accumulating(backward and (self.apart or self._reduces_after(count) or i + 1 < count))

    def _reduce(self, count: int) -> None:
        """After a pass over so many micro-batches, what the wrapper has not reduced."""
        if self._reduces_after(count) and not self.apart:
            self.ranks.mean_(list(self.gradients().values()))

    def _reduces_after(self, count: int) -> bool:
        """Whether gradients go to masters after each micro-batch, and so are not there to be reduced with the last."""
        return bool(self.copies) and count > 1 and not (self.ranks.alone or self.ranks.no_local)

    @property
    def joins(self) -> bool:
        """Whether the gradients of two passes can be reduced as one; not those of masters, which no wrapper sees."""
        return self.ranks.adds and not self.copies and not self.apart

    @contextmanager
    def left_apart(self, apart: bool) -> Iterator[None]:
        """Passes whose gradients stay each rank's own, where `apart`."""
        before, self.apart = self.apart, self.apart or apart
        try:
            yield
        finally:
            self.apart = before

    # --- what one step does once --------------------------------------------------------------------------------------

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Running statistics (BatchNorm's) as they are before: one step updates them once, in its base pass."""
        modules = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)

    def room_for(self, params: Sequence[Any]) -> list[Tensor] | None:
        """On a CPU the arrays that the last perturbed weights were written to, else None.

        New pages cost more than what is written to them: into fresh arrays a perturbation took 2.4 times as long. The
        peak is the second pass's either way. Other devices have allocators that keep their memory.
        """
        if self.ranks.sharded or any(p.device.type != "cpu" for p in params):
            return None
        for p in params:
            if p not in self._room:
                self._room[p] = torch.empty_like(p, requires_grad=False)
        return [self._room[p] for p in params]

    @contextmanager
    def at(self, params: Sequence[Any], moved: list[Tensor]) -> Iterator[None]:
        """The model at other weights.

        The parameters only point elsewhere meanwhile, so θ comes back to the bit. Compute copies of masters have been
        written over instead, and are to be had again from the masters: by the optimizer's update, or by `refresh`.
        """
        if self.ranks.sharded:
            with self._shards_at(params, moved):
                yield
            return
        original = [] if self.copies else [p.data for p in params]
        try:
            if self.copies:
                self.stale, self._head = True, None
            else:
                for p, data in zip(params, moved, strict=True):
                    p.data = data
            torch.clear_autocast_cache()  # inside the user's autocast it holds casts of θ
            yield
        finally:
            for p, data in zip(params, original, strict=False):
                p.data = data
            torch.clear_autocast_cache()

    @contextmanager
    def _shards_at(self, params: Sequence[Any], moved: list[Tensor]) -> Iterator[None]:
        """FSDP2 gathers weights from where its shards lie: those are written over, and written back from a copy."""
        shards, written = [local(p).detach() for p in params], 0
        self.ranks.reshard()
        self._head = None
        try:
            for i, shard in enumerate(shards):
                there, moved[i] = moved[i], shard.clone()
                written = i + 1
                shard.copy_(there)
            del there
            torch.clear_autocast_cache()
            yield
        finally:
            for shard, theta in zip(shards[:written], moved, strict=False):
                shard.copy_(theta)
            self.ranks.reshard()
            self._head = None
            torch.clear_autocast_cache()

    def refresh(self) -> None:
        """The compute copies as their masters say, where a perturbation has written over them."""
        if self.ranks.sharded:
            self._head = None
        if self.stale:
            for master, p in self.copies.items():
                p.data.copy_(master.detach())
            self.fresh()

    def fresh(self) -> None:
        """Note that somebody has written the copies from the masters."""
        self.stale, self._head = False, None


def _named(region: str, direction: str) -> Any:
    return f"{region} {direction}"


def rescaled(kept: Kept, factor: Tensor) -> Kept:
    """The same cotangent as a share of a larger batch, or as one of another strength."""
    z = kept.cotangent
    if isinstance(z, tuple):
        z = tuple(x.mul_(factor.to(x)) for x in z)
    elif isinstance(z, Tensor):
        z = z * factor.to(z)
    elif z is not None:
        z = dataclasses.replace(z, weights_N=z.weights_N * factor.to(z.weights_N))
    return Kept(z, kept.unit / factor, kept.rng_state)


def shares(first: Passed, rest: Passed) -> tuple[Tensor, Tensor]:
    """What each weighs in both together."""
    total = first.weight + rest.weight
    safe = torch.where(total > 0, total, 1)
    return first.weight / safe, rest.weight / safe


def together(first: Passed, rest: Passed) -> Passed:
    """Both as one pass; cotangents of the rest are kept where it kept any."""
    mine, other = shares(first, rest)
    kept = [*(rescaled(k, mine) for k in first.kept), *(rescaled(k, other) for k in rest.kept)]
    if len(kept) > 1 and isinstance(kept[-1].cotangent, tuple) and len(kept[len(first.kept)].cotangent) > 1:
        # The head's own gradient is held once, in the first.
        place = len(first.kept)
        for total, more in zip(kept[0].cotangent[1:], kept[place].cotangent[1:], strict=True):
            total.add_(more)
        kept[place] = kept[place]._replace(cotangent=kept[place].cotangent[:1])
    return Passed(first.loss * mine + rest.loss * other, first.weight + rest.weight, kept)


def flatten(batch: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, tree = _pytree.tree_flatten(batch)
    return leaves, lambda leaves: _pytree.tree_unflatten(leaves, tree)
