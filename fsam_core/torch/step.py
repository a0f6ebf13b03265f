"""The step in PyTorch: `Step`, which replaces forward, backward and `optimizer.step()`. Usage: `fsam_core.torch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fsam_core import backends, schedules, scopes
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed, Plain
from fsam_core.regions import in_torch
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.scopes import Blocks
from fsam_core.torch import correction, gradients, heads, passes
from fsam_core.torch.dtensor import like, local
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.loss_scale import LossScale, Scaling
from fsam_core.torch.parallel import Sync, detect_parallelism, plain_name
from fsam_core.torch.passes import Features, PassConfig
from fsam_core.torch.perturbation import StepInputs, StepResult
from fsam_core.torch.staged import SharedPrefix, Staged
from fsam_core.torch.weights import Weights
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.torch.adamw import AdamW


class Info(NamedTuple):
    """The results of the last step; NaN if the method does not need a figure and it would cost a pass."""

    loss: float
    """Mean loss at θ, over the part of the batch that is evaluated there; at θ+ε for sam with a known ascent."""
    perturbed_loss: float
    """Mean loss at θ+ε, on S, where the method evaluates it (sam, logit)."""
    weight: float
    """Sum of the token weights over all micro-batches and ranks."""
    base_norm: float
    """‖g‖₂ of the plain gradient; for the exact method with a scope, and for `Staged`, over the scope's tensors."""
    grad_norm: float
    """‖ĝ‖₂ of the gradient the optimizer received, before clipping."""
    perturbation_norm: float
    """‖ε‖₂; 0 where nothing is perturbed."""
    skipped: bool
    """Whether the update was skipped because a loss or a norm of either pass was not finite."""


class Step:
    """One optimizer step of `method`, which replaces forward, backward and `optimizer.step()`.

    Attributes:
        ops: the backend's operations.
        info: the results of the last step, None before the first.
        steps: completed optimizer steps; the argument of every schedule.
        skipped_steps: steps skipped because something was not finite. The optimizer does not count them.
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
            model: any module, plain, in DistributedDataParallel or under `fully_shard`. Its parameters must be the
                optimizer's, or the `copies` of a `fsam_core.torch.AdamW`. Some may be DTensors on a tensor axis.
            optimizer: with precondition="adam" one that keeps `exp_avg_sq`: Adam, AdamW, NAdam, RAdam.
            method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
            features: (model, batch) -> `LinearHead` or `Logits`, called once a pass. With `Staged` the passes share the
                part of the model that the method's scope does not move. Random draws from PyTorch's own generators are
                the same in both passes; draws from a private `torch.Generator` are not replayed. With several ranks it
                is called inside the wrapper's forward pass, with the module that was wrapped, and `Staged` shares
                nothing.
            clip_norm: global norm that the final gradient is clipped to, once; None for no clipping.
            schedule: the steps that have a correction.
            blocks: which parameter belongs to which block, for a scope that is given by name.
            memory: the head's memory budget: working bytes, and whether its cotangent is kept or recomputed.
            backend: "torch", "triton" or "auto" (default: FSAM_BACKEND, then auto).
            sync: the gradient that a rank's perturbation follows. "global": that of the whole batch, as in one process.
                "local": that of the rank's own tokens, summed and divided by the ranks' mean count (m-sharpness).
                Gradients are then reduced once, after the last pass; DistributedDataParallel only.
            loss_scale: `LossScale()` for a float16 model with float32 masters; None for none. A step whose scaled
                gradients overflow is skipped and lowers the scale.

        Raises:
            UserError: for an optimizer without Adam's settings, clip_norm ≤ 0, an unknown backend, a scope or schedule
                that does not fit the rest, a loss scale without masters, or an unknown wrapper of the model.
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
        parallel = detect_parallelism(model)
        if sync not in get_args(Sync):
            raise UserError(f"sync: {sync!r} is not known; use 'global' or 'local'")
        if sync == "local" and parallel.why_not_local:
            raise UserError(
                f"sync: 'local' needs each rank's own gradient, {parallel.why_not_local}; use sync='global'"
            )
        self.model, self.optimizer, self.method, self.schedule = model, optimizer, method, schedule
        self.features, self.memory, self.clip_norm = features, memory, clip_norm
        self.steps = self.skipped_steps = 0
        self.info: Info | None = None
        chosen = backends.choose("torch", backend)
        for device in sorted({p.device.type for p in model.parameters()}):
            backends.check_device(chosen.name, device)
        self.ops = backends.load("torch", chosen.name)
        copies: Any = getattr(optimizer, "copies", {})
        if copies and parallel.sharded:
            raise UserError(
                "optimizer: shards of weights are the masters themselves; leave `copies` out and give fully_shard "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
            )
        if loss_scale is not None and not copies:
            raise UserError(
                "loss_scale: it is undone where gradients go to float32 masters; give an AdamW with `copies`, as of "
                "masters(model, torch.float16)"
            )
        self._scaling = None if loss_scale is None else Scaling.begin(loss_scale)
        self._parallel, self._weights = parallel, Weights(parallel, copies)
        self._local = sync == "local" and parallel.count > 1
        # Between steps: ĝ of the last one that was taken, and the last correction, where the method needs them.
        self._previous: Gradients = {}
        self._correction: Gradients = {}
        names = {id(p): plain_name(name) for name, p in parallel.inner.named_parameters()}
        names |= {id(master): names.get(id(p), "") for master, p in self._weights.copies.items()}
        self._outside: frozenset[int] = frozenset()
        self._shares_prefix: SharedPrefix | None = None
        if isinstance(method, Perturbed):
            known = sorted(set(names.values()))
            mask = scopes.mask(method.scope, known, blocks)
            moves = dict.fromkeys(known, True) if mask is None else dict(zip(known, mask, strict=True))
            self._outside = frozenset(i for i, name in names.items() if not moves.get(name, True))
            if isinstance(features, Staged):
                moving = {i: name for i, name in names.items() if i not in self._outside}
                self._shares_prefix = SharedPrefix(features, parallel.inner, method, moving)

    def __call__(self, batch: Any) -> Tensor:
        """Take one step; returns the mean loss at θ, detached.

        `batch` is what `features` takes. A list holds micro-batches; its gradient is that of one batch of them all, in
        which each token has the same weight. If a pass raises, weights and optimizer state are as before.
        """
        try:
            loss, g_hat, clip = self._gradient(batch)
            assert self.info is not None
            if self.info.skipped:
                gradients.write(g_hat)
                self.skipped_steps += 1
            else:
                with in_torch("update"):
                    self._update(g_hat, clip)
                self.steps += 1
        finally:
            self._weights.sync_from_masters()
        return loss

    def gradient(self, batch: Any) -> Tensor:
        """The first half of a step: write ĝ, clipped, to every parameter's `.grad`, without an optimizer step.

        Returns the mean loss at θ, detached. With `info.skipped` ĝ is not finite and must not be used.
        """
        try:
            loss, g_hat, clip = self._gradient(batch)
            gradients.write(_clipped(g_hat, clip))
        finally:
            self._weights.sync_from_masters()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model's and the optimizer's own state.

        Two counts, and the loss scale where there is one; with ascent="previous" or between="reuse" also one tensor for
        each parameter.
        """
        state: dict[str, Any] = {"steps": self.steps, "skipped_steps": self.skipped_steps}
        if self._scaling is not None:
            state["loss_scale"] = self._scaling.state()
        for name, of in (("previous", self._previous), ("correction", self._correction)):
            if self._remembers(name):
                every = {p: like(p, of[p]) if p in of else torch.zeros_like(p) for p in self._params()}
                state[name] = {str(i): x for i, x in enumerate(every.values())}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. What a checkpoint of another method does not have starts from zero."""
        self.steps, self.skipped_steps = int(state["steps"]), int(state["skipped_steps"])
        if self._scaling is not None and "loss_scale" in state:
            self._scaling.load(state["loss_scale"])
        self._previous, self._correction = (self._loaded(name, state) for name in ("previous", "correction"))

    def _loaded(self, name: str, state: dict[str, Any]) -> Gradients:
        if not self._remembers(name):
            return {}
        of = {p: state.get(name, {}).get(str(i)) for i, p in enumerate(self._params())}
        return {p: local(x.to(p.device, p.dtype)) for p, x in of.items() if x is not None}

    def _remembers(self, name: str) -> bool:
        """Whether "previous" or "correction" goes from step to step."""
        if not isinstance(self.method, Perturbed):
            return False
        return self.method.direction.remembers if name == "previous" else self.schedule.between == "reuse"

    def _params(self) -> list[Any]:
        """The optimizer's tensors."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _gradient(self, batch: Any) -> tuple[Tensor, Gradients, float]:
        """(loss, ĝ, the factor that clips it)."""
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise UserError("batch: got an empty list of micro-batches; give at least one")
        kind = self.schedule.kind(self.steps) if isinstance(self.method, Perturbed) else "plain"
        local = self._local and kind == "corrected"
        config = PassConfig(
            ops=self.ops,
            parallel=self._parallel,
            weights=self._weights,
            features=self.features,
            memory=self.memory,
            params=self._params(),
            optimizer=self.optimizer,
            loss_scale=1.0 if self._scaling is None else self._scaling.scale,
            reduces=not local,
        )
        try:
            result = self._corrected(config, batches, local) if kind == "corrected" else self._plain(config, batches)
            base_norm, g_hat = result.base_norm, result.g_hat
            if kind == "reused":
                g_hat = {p: g.add_(self._correction[p]) if p in self._correction else g for p, g in g_hat.items()}
            norm = base_norm if kind == "plain" else gradients.local_norm(self._parallel, config.params, g_hat)
            scalars = self._reduced(result, norm, local)
        except BaseException:
            passes.clear_gradients(config)
            self._parallel.reset()
            raise
        self.info = info = _info(result.weight * self._parallel.count, *scalars)
        if self._scaling is not None:
            self._scaling.seen(info.skipped)
        if self._remembers("previous") and not info.skipped:
            # A copy: the optimizer's zero_grad(set_to_none=False) writes over what is in `.grad`.
            self._previous = {p: g.clone() for p, g in g_hat.items()}
        if result.correction is not None and not info.skipped:
            self._correction = result.correction
        clips = self.clip_norm is not None and not info.skipped and info.grad_norm > self.clip_norm
        loss = scalars[0]
        assert loss is not None
        return loss, g_hat, (self.clip_norm or 1.0) / info.grad_norm if clips else 1.0

    def _plain(self, config: PassConfig, batches: list[Any]) -> StepResult:
        g_B, base = passes.loss_and_grad(config, batches)
        norm = gradients.local_norm(self._parallel, gradients.with_gradient(g_B), g_B)
        return StepResult(g_B, base.loss, None, base.weight, norm, None)

    def _corrected(self, config: PassConfig, batches: list[Any], local: bool) -> StepResult:
        assert isinstance(self.method, Perturbed)
        inputs = StepInputs(
            config=config,
            method=self.method,
            step=self.steps,
            clip_norm=self.clip_norm,
            previous=self._previous,
            outside=self._outside,
            keeps_correction=self._remembers("correction"),
            shares_prefix=self._shares_prefix,
        )
        return correction.corrected(inputs, batches, local=local)

    def _reduced(self, result: StepResult, norm: Any, local: bool) -> list[Any]:
        """(loss, perturbed loss, base norm, norm, ‖ε‖₂) over all ranks, so that they skip a step all or none."""
        losses, reduce = (result.loss, result.moved_loss), self._parallel.all_reduce_scalars
        if local:
            loss, moved, base, length, norm = reduce((*losses, result.base_norm, result.length), (norm,))
            return [loss, moved, base, norm, length]
        return [*reduce(losses, (result.base_norm, norm)), result.length]

    def _update(self, g_hat: Gradients, clip: float) -> None:
        if isinstance(self.optimizer, AdamW):
            gradients.write(g_hat)
            self.optimizer.step(clip=clip)
            self._weights.mark_synced()  # it has written the copies of its masters
        else:
            gradients.write(_clipped(g_hat, clip))
            self.optimizer.step()


def _clipped(g_hat: Gradients, factor: float) -> Gradients:
    """ĝ times the factor, in place."""
    if factor != 1:
        torch._foreach_mul_(list(g_hat.values()), factor)
    return g_hat


def _info(weight: Tensor, loss: Any, moved_loss: Any, base_norm: Any, norm: Tensor, length: Any) -> Info:
    """The figures as numbers: the one place where the host waits for the device."""
    given = [loss, moved_loss, weight, base_norm, norm, length]
    tensors = [x.detach().to(norm.device, torch.float64) for x in given if x is not None]
    values = iter(torch.stack(tensors).tolist())
    numbers = [math.nan if x is None else next(values) for x in given]
    evaluated = [number for number, x in zip(numbers, given, strict=True) if x is not None]
    numbers[-1] = 0.0 if length is None else numbers[-1]
    return Info._make([*numbers, not all(map(math.isfinite, evaluated))])


def mean_loss(
    features: Features, *, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> mean loss with the same head, for evaluation: no gradient, no N×V tensor.

    For a model in DistributedDataParallel or under `fully_shard` it is the mean over the batches of all ranks, and all
    ranks must call it.
    """
    ops = backends.load("torch", backend)

    @torch.no_grad()
    def loss(model: nn.Module, batch: Any) -> Tensor:
        parallel = detect_parallelism(model)
        head = heads.flat(parallel.call_features(features, batch))
        weight = parallel.mean(heads.weight(head))
        unit = torch.where(weight > 0, weight, 1)
        return parallel.mean(heads.cotangent(ops, head, unit, memory, gradient=False)[0])

    return loss
