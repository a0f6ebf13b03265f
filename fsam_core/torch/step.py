"""The step in PyTorch: `Step`, in place of forward, backward and `optimizer.step()`. Its use: `fsam_core.torch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fsam_core import backends, schedules
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed, Plain
from fsam_core.regions import in_torch
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.scopes import Blocks
from fsam_core.torch import heads, parallel
from fsam_core.torch.correction import Corrections, Outcome
from fsam_core.torch.loss_scale import LossScale, Scaling
from fsam_core.torch.parallel import Sync, local
from fsam_core.torch.passes import Features, Passes
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.torch.adamw import AdamW


class Info(NamedTuple):
    """What the last step saw. A figure the method has no use for, and that would cost a pass, is NaN."""

    loss: float
    """Mean loss at θ, on as much of the batch as is evaluated there; at θ+ε where nothing is (sam, known ascent)."""
    perturbed_loss: float
    """Mean loss at θ+ε, on S, where the method evaluates it (sam, logit)."""
    weight: float
    """Sum of the token weights over all micro-batches and ranks."""
    base_norm: float
    """‖g‖₂ of the plain gradient; with a scope, of the exact method or of `Staged`, that of the tensors in it."""
    grad_norm: float
    """‖ĝ‖₂ of the gradient the optimizer received, before clipping."""
    perturbation_norm: float
    """‖ε‖₂; 0 where nothing is perturbed."""
    skipped: bool
    """Whether the update was left out because a loss or a norm of either pass was not finite."""


class Step:
    """One optimizer step of `method`, in place of forward, backward and `optimizer.step()`.

    Attributes:
        ops: the backend's operations.
        info: what the last step saw, None before the first.
        steps: optimizer steps taken; the argument of every schedule.
        skipped_steps: steps left out because something was not finite. The optimizer does not see those at all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        features: Features,
        clip_norm: float | None = None,
        schedule: Schedule = ALWAYS,
        blocks: Blocks | None = None,
        memory: Memory = AUTO,
        backend: str | None = None,
        sync: Sync = "global",
        loss_scale: LossScale | None = None,
    ) -> None:
        """
        Args:
            model: any module, in DistributedDataParallel or under `fully_shard` or neither; its parameters must be the
                optimizer's, or the `copies` of a `fsam_core.torch.AdamW`. Some may be DTensors on a tensor axis.
            optimizer: with precondition="adam" one that keeps `exp_avg_sq`: Adam, AdamW, NAdam, RAdam.
            method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
            features: (model, batch) -> `LinearHead` or `Logits`; a `Staged` one shares between the passes what the
                method's scope leaves alone. Called once a pass. Random draws from PyTorch's own generators are the same
                in both passes; draws from a private `torch.Generator` are not replayed. With several ranks it is called
                inside the wrapper's forward pass, with the module that was wrapped, and a `Staged` one shares nothing.
            clip_norm: global norm that the final gradient is clipped to, once; None for no clipping.
            schedule: at which steps there is a correction.
            blocks: what the parameters are, for a scope that is given by name.
            memory: what may be spent on the head: working bytes, and whether its cotangent is kept or recomputed.
            backend: "torch", "triton" or "auto" (default: FSAM_BACKEND, then auto).
            sync: what the ranks' perturbation is. "global": that of the whole batch, as in one process. "local": each
                rank ascends its own share of the gradient (m-sharpness), and gradients are reduced once, after the last
                pass; in DistributedDataParallel alone. A rank's share is its tokens' sum over the ranks' mean count.
            loss_scale: for a float16 model beside float32 masters, `LossScale()`; None for none. A step whose scaled
                gradients overflow is skipped, and the scale then lower.

        Raises:
            UserError: for an optimizer without Adam's settings, clip_norm ≤ 0, an unknown backend, a scope or schedule
                that does not go with the rest, a loss scale without masters, or a wrapper of the model that is not
                known.
        """
        if not isinstance(method, Plain | Perturbed):
            raise UserError(f"method must be Plain(), SAM(...), FunctionalSAM(...) or LogitSAM(...), got {method!r}")
        if isinstance(method, Perturbed) and method.precondition == "adam":
            lacks = any("betas" not in group or "eps" not in group for group in optimizer.param_groups)
            if lacks or isinstance(optimizer, torch.optim.Adamax):
                kind = type(optimizer).__name__
                raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kind}")
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"clip_norm must be > 0, or None for no clipping; got {clip_norm!r}")
        schedules.check(schedule, method)
        ranks = parallel.of(model)
        if sync not in get_args(Sync):
            raise UserError(f"sync: {sync!r} is not known; use 'global' or 'local'")
        if sync == "local" and ranks.no_local:
            raise UserError(f"sync: 'local' needs each rank's own gradient, {ranks.no_local}; use sync='global'")
        self.model, self.optimizer, self.method, self.schedule = model, optimizer, method, schedule
        self.clip_norm = clip_norm
        self.steps = self.skipped_steps = 0
        self.info: Info | None = None
        chosen = backends.choose("torch", backend)
        for device in sorted({p.device.type for p in model.parameters()}):
            backends.check_device(chosen.name, device)
        self.ops = backends.load("torch", chosen.name)
        copies: Any = dict(getattr(optimizer, "copies", {}))
        if copies and ranks.sharded:
            raise UserError(
                "optimizer: shards of weights are the masters themselves; leave `copies` out and give fully_shard "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
            )
        if loss_scale is not None and not copies:
            raise UserError(
                "loss_scale: it is undone where gradients go to float32 masters; give an AdamW with `copies`, as of "
                "masters(model, torch.float16)"
            )
        self._scaling = None if loss_scale is None else Scaling.begun(loss_scale)
        self._ranks, self._passes = ranks, Passes(self.ops, ranks, optimizer, features, memory, copies)
        reuses = schedule.between == "reuse"
        sync = sync if ranks.count > 1 else "global"
        self._corrections = Corrections(self._passes, method, clip_norm, blocks, reuses=reuses, sync=sync)

    def __call__(self, batch: Any) -> Tensor:
        """Take one step; returns the mean loss at θ, detached.

        `batch` is whatever `features` takes; a list is taken as micro-batches, whose gradient is that of one batch of
        them all, each token weighing the same. If either pass raises, weights and optimizer state are as before.
        """
        try:
            loss, clip = self._gradient(batch)
            assert self.info is not None
            if self.info.skipped:
                self.skipped_steps += 1
            else:
                with in_torch("update"):
                    self._update(clip)
                self.steps += 1
        finally:
            self._passes.refresh()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's own state.

        Two counts, and the loss scale where there is one; with ascent="previous" or between="reuse" also one tensor for
        each parameter.
        """
        state: dict[str, Any] = {"steps": self.steps, "skipped_steps": self.skipped_steps}
        if self._scaling is not None:
            state["loss_scale"] = self._scaling.state()
        for name, tensors in self._remembered():
            state[name] = {str(i): tensors.get(p, torch.zeros_like(p)) for i, p in enumerate(self._corrections.all())}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `state_dict` gave it. What a checkpoint of another method did not remember starts from zero."""
        self.steps, self.skipped_steps = int(state["steps"]), int(state["skipped_steps"])
        if self._scaling is not None and "loss_scale" in state:
            self._scaling.load(state["loss_scale"])
        for name, tensors in self._remembered():
            tensors.clear()
            for i, p in enumerate(self._corrections.all()):
                if str(i) in state.get(name, {}):
                    tensors[p] = state[name][str(i)].to(p.device, p.dtype)

    def gradient(self, batch: Any) -> Tensor:
        """The first half of a step: leaves ĝ, clipped, in every parameter's `.grad` and takes no optimizer step.

        Returns the mean loss at θ, detached; whether ĝ is to be used says `info.skipped`.
        """
        try:
            loss, clip = self._gradient(batch)
            self._scale(clip)
        finally:
            self._passes.refresh()
        return loss

    def _gradient(self, batch: Any) -> tuple[Tensor, float]:
        """(loss, the factor that clips): ĝ in `.grad`, unclipped."""
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise UserError("batch: got an empty list of micro-batches; give at least one")
        method, passes, ranks = self.method, self._passes, self._ranks
        passes.loss_scale = 1.0 if self._scaling is None else self._scaling.scale
        kind = self.schedule.kind(self.steps) if isinstance(method, Perturbed) else "plain"
        try:
            if kind == "corrected":
                seen = self._corrections.gradient(batches, self.steps)
                norm = self._corrections.norm_here(passes.params())
            else:
                base = passes.base(batches)
                norm = base_norm = self._corrections.norm_here(self._corrections.checked())
                seen = Outcome(base.loss, None, base.weight, base_norm, None)
                if kind == "reused":
                    for p in passes.params():
                        if p in self._corrections.correction:
                            p.grad.add_(self._corrections.correction[p])
                    norm = self._corrections.norm_here(passes.params())
            loss, moved_loss, base_norm, norm, length = self._agreed(seen, norm, kind)
        except BaseException:
            passes.clear()
            ranks.reset()
            raise
        given = [loss, moved_loss, seen.weight * ranks.count, base_norm, norm, length]
        # The one place where the host waits for the device.
        tensors = [x.detach().to(norm.device, torch.float64) for x in given if x is not None]
        values = iter(torch.stack(tensors).tolist())
        numbers = [math.nan if x is None else next(values) for x in given]
        evaluated = [x for x, tensor in zip(numbers, given, strict=True) if tensor is not None]
        numbers[-1] = 0.0 if length is None else numbers[-1]
        self.info = info = Info._make([*numbers, not all(map(math.isfinite, evaluated))])
        if self._scaling is not None:
            self._scaling.seen(info.skipped)
        if isinstance(method, Perturbed) and method.direction.remembers and not info.skipped:
            self._corrections.previous = passes.held({p: p.grad for p in passes.params()})
        clips = self.clip_norm is not None and not info.skipped and info.grad_norm > self.clip_norm
        return loss, (self.clip_norm or 1.0) / info.grad_norm if clips else 1.0

    def _agreed(self, seen: Outcome, norm: Any, kind: str) -> list[Any]:
        """(loss, perturbed loss, base norm, norm, ‖ε‖) over all ranks, so that they skip a step all or none."""
        losses = (seen.loss, seen.moved_loss)
        if kind == "corrected" and self._corrections.sync == "local":
            loss, moved, base, length, norm = self._ranks.agreed((*losses, seen.base_norm, seen.length), (norm,))
        else:
            loss, moved, base, norm = self._ranks.agreed(losses, (seen.base_norm, norm))
            length = seen.length
        return [loss, moved, base, norm, length]

    def _update(self, clip: float) -> None:
        if isinstance(self.optimizer, AdamW):
            self.optimizer.step(clip=clip)
            self._passes.fresh()  # it has written the copies of its masters
        else:
            self._scale(clip)
            self.optimizer.step()

    def _remembered(self) -> list[tuple[str, dict[Any, Tensor]]]:
        method = self.method
        keeps = isinstance(method, Perturbed) and method.direction.remembers
        reuses = isinstance(method, Perturbed) and self.schedule.between == "reuse"
        return [("previous", self._corrections.previous)] * keeps + [
            ("correction", self._corrections.correction)
        ] * reuses

    def _scale(self, factor: float) -> None:
        if factor != 1:
            grads = [local(p.grad) for p in self._passes.params()]
            if self._corrections.previous:  # it is of before clipping
                self._corrections.previous = {p: g.clone() for p, g in self._corrections.previous.items()}
            torch._foreach_mul_(grads, factor)


def masters(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[Tensor, nn.Parameter]:
    """Turn the model's floating parameters to `dtype` and return their masters: what the optimizer is to be given.

        copies = masters(model)
        optimizer = AdamW(copies, lr=3e-4, copies=copies)

    Returns:
        master, a float32 tensor that requires gradients as the parameter does -> the parameter.
    """
    found: dict[Tensor, nn.Parameter] = {}
    for p in model.parameters():
        if p.is_floating_point():
            found[p.detach().float().clone().requires_grad_(p.requires_grad)] = p
            p.data = p.data.to(dtype)
    return found


def mean_loss(
    features: Features, *, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> mean loss with the same head, for evaluation: no gradient, no N×V tensor.

    Of a model in DistributedDataParallel or under `fully_shard` the mean over the batches of all ranks, which must all
    call it.
    """
    ops = backends.load("torch", backend)

    @torch.no_grad()
    def loss(model: nn.Module, batch: Any) -> Tensor:
        ranks = parallel.of(model)
        head = heads.flat(ranks.head(features, batch))
        weight = ranks.mean(heads.weight(head))
        unit = torch.where(weight > 0, weight, 1)
        return ranks.mean(heads.cotangent(ops, head, unit, memory, gradient=False, keep=False)[0])

    return loss
