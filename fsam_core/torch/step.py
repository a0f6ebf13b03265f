"""The step in PyTorch: `Step`, which replaces forward, backward and `optimizer.step()`. Usage: `fsam_core.torch`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fsam_core import backends, schedules, scopes
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed, Plain
from fsam_core.regions import in_torch
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.scopes import Blocks
from fsam_core.split import micro_batches
from fsam_core.torch import correction, cotangents, gradients, heads, optimizers, passes
from fsam_core.torch.dtensor import like, local
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.info import Info
from fsam_core.torch.loss_scale import LossScale, Scaling
from fsam_core.torch.parallel import Sync, detect_parallelism, plain_name
from fsam_core.torch.passes import Features, PassConfig
from fsam_core.torch.perturbation import StepInputs, StepResult
from fsam_core.torch.replay import Replay
from fsam_core.torch.staged import SharedPrefix, Staged
from fsam_core.torch.weights import Weights
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.torch.adamw import AdamW


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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
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
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """
        Args:
            model: any module, plain, in DistributedDataParallel or under `fully_shard`. Its parameters must be the
                optimizer's, or the `copies` of a `fsam_core.torch.AdamW`. Some may be DTensors on a tensor axis.
            optimizer: one, or a list of several with parameters of their own. With precondition="adam" every parameter
                that moves is in one that keeps `exp_avg_sq`: Adam, AdamW, NAdam, RAdam, SparseAdam.
            method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
            features: (model, batch) -> `LinearHead`, `Outputs`, `Logits` or `Heads`, called once a pass. With `Staged`
                the passes share the part of the model that the method's scope does not move. Both passes see the same
                buffers, and the same random draws from PyTorch's own generators; draws from a private
                `torch.Generator` are not replayed. With several ranks it is called inside the wrapper's forward pass,
                with the module that was wrapped, and `Staged` shares nothing.
            clip_norm: the global norm that the gradient is clipped to before the update, once; None for no clipping.
            schedule: the steps that have a correction.
            blocks: which parameter belongs to which block, for a scope that is given by name.
            memory: the head's memory budget: working bytes, and whether its cotangent is kept or recomputed.
            backend: "torch", "triton" or "auto" (default: FSAM_BACKEND, then auto).
            sync: the gradient that a rank's perturbation follows. "global": that of the whole batch, as in one process.
                "local": that of the rank's own tokens, summed and divided by the ranks' mean count (m-sharpness).
                Gradients are then reduced once, after the last pass; DistributedDataParallel only.
            loss_scale: `LossScale()` for a float16 model with float32 masters; None for none. A step whose scaled
                gradients overflow is skipped and lowers the scale.
            scaler: the `torch.amp.GradScaler` of a float16 autocast. The step scales, unscales, steps and updates it.

        Raises:
            UserError: for a parameter that moves and has no second moment, or is in two optimizers; clip_norm ≤ 0, an
                unknown backend, a scope or schedule that does not fit the rest, a loss scale without masters or beside
                a scaler, or an unknown wrapper of the model.
        """
        if not isinstance(method, Plain | Perturbed):
            raise UserError(f"method must be Plain(), SAM(...), FunctionalSAM(...) or LogitSAM(...), got {method!r}")
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
        names: dict[Tensor, str] = {p: plain_name(name) for name, p in parallel.inner.named_parameters()}
        self._optimizers = optimizers.as_tuple(optimizer, names)
        copies = optimizers.copies(self._optimizers)
        names |= {master: names.get(p, "") for master, p in copies.items()}
        if copies and parallel.sharded:
            raise UserError(
                "optimizer: shards of weights are the masters themselves; leave `copies` out and give fully_shard "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
            )
        if loss_scale is not None and not copies:
            raise UserError(
                "loss_scale: it is undone where gradients go to float32 masters; give an AdamW with `copies`, as of "
                "masters(model, torch.float16), or scaler=torch.amp.GradScaler() for float32 weights under autocast"
            )
        if scaler is not None and (loss_scale is not None or copies):
            raise UserError("scaler: masters take loss_scale=LossScale() instead; a GradScaler does not know them")
        self.model, self.optimizer, self.method, self.schedule = model, optimizer, method, schedule
        self.features, self.memory, self.clip_norm = features, memory, clip_norm
        self.steps = self.skipped_steps = 0
        self.info: Info | None = None
        chosen = backends.choose("torch", backend)
        for device in sorted({p.device.type for p in model.parameters()}):
            backends.check_device(chosen.name, device)
        self.ops = backends.load("torch", chosen.name)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scaling = None if loss_scale is None else Scaling.begin(loss_scale)
        self._parallel, self._weights = parallel, Weights(parallel, copies)
        self._replay = Replay(parallel.inner)
        self._local = sync == "local" and parallel.count > 1
        # Between steps: ĝ of the last one that was taken, and the last correction, where the method needs them.
        self._previous: Gradients = {}
        self._correction: Gradients = {}
        embeddings = (m for m in parallel.inner.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        self._sparse = {m.weight for m in embeddings if m.sparse}
        self._outside: set[Any] = set()
        self._shares_prefix: SharedPrefix | None = None
        if isinstance(method, Perturbed):
            known = sorted(set(names.values()))
            mask = scopes.mask(method.scope, known, blocks)
            moves = dict.fromkeys(known, True) if mask is None else dict(zip(known, mask, strict=True))
            self._outside = {p for p, name in names.items() if not moves.get(name, True)}
            every = dict.fromkeys(self._params(), "") | names
            moving = {p: name for p, name in every.items() if p not in self._outside}
            if method.precondition == "adam":
                optimizers.check_second_moments(self._optimizers, moving)
            if isinstance(features, Staged):
                self._shares_prefix = SharedPrefix(features, parallel.inner, method, moving, self._replay)

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A step of a copied model and copied optimizers; `copy.deepcopy` of both together with it keeps them one."""
        new = object.__new__(type(self))
        memo |= {id(self): new, id(self.ops): self.ops}  # a module cannot be copied
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __call__(self, batch: Any) -> Tensor:
        """Take one step; returns the mean loss at θ, detached.

        `batch` is what `features` takes, whatever the loader gives. The gradient of `MicroBatches([...])` is that of
        one batch of them all, in which each token has the same weight. `.grad` is ĝ afterwards, clipped, and None if
        the step was skipped; what it was before is lost. If a pass raises, weights and optimizer state are as before.

        Raises:
            UserError: for what the step cannot do right with this batch, and in `torch.inference_mode`.
        """
        try:
            loss, g_hat, clip = self._gradient(batch)
            assert self.info is not None
            with in_torch("update"):
                self._update(g_hat, clip, self.info.skipped)
        finally:
            self._weights.sync_from_masters()
        self._count()
        return loss

    def gradient(self, batch: Any, *, clip: bool = False, keep_grad: bool = False) -> Tensor:
        """A step whose update is the caller's: it counts the step, and leaves ĝ in every parameter's `.grad`.

            loss = step.gradient(batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

        With `info.skipped`, `.grad` is None, so that an optimizer's step changes nothing. With a `scaler` it is the
        scaled ĝ, or infinite, for the caller's `scaler.step(optimizer)` and `scaler.update()`.

        Args:
            batch: as in a call of the step.
            clip: whether ĝ is clipped to `clip_norm` here.
            keep_grad: whether ĝ is added to what `.grad` holds already, and not put in its place.

        Returns:
            The mean loss at θ, detached.
        """
        before = {p: p.grad for p in self._params() if p.grad is not None} if keep_grad else {}
        try:
            loss, g_hat, factor = self._gradient(batch)
            assert self.info is not None
            if self._scaler is not None or not self.info.skipped:
                gradients.write(self._scaled(g_hat, factor if clip else 1.0, self.info.skipped), self._sparse)
        finally:
            self._weights.sync_from_masters()
            for p, grad in before.items():
                p.grad = grad if p.grad is None else p.grad + grad
        self._count()
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
        """The optimizers' tensors."""
        return optimizers.params(self._optimizers)

    def _count(self) -> None:
        assert self.info is not None
        self.skipped_steps += self.info.skipped
        self.steps += not self.info.skipped

    @torch.enable_grad()
    def _gradient(self, batch: Any) -> tuple[Tensor, Gradients, float]:
        """(loss, ĝ, the factor that clips it)."""
        if torch.is_inference_mode_enabled():
            raise UserError("a step takes gradients, which torch.inference_mode() cannot; call it outside")
        batches = micro_batches(batch)
        kind = self.schedule.kind(self.steps) if isinstance(self.method, Perturbed) else "plain"
        local = self._local and kind == "corrected"
        config = PassConfig(
            ops=self.ops,
            parallel=self._parallel,
            weights=self._weights,
            features=self.features,
            memory=self.memory,
            params=self._params(),
            optimizers=self._optimizers,
            replay=self._replay if kind == "corrected" else None,
            loss_scale=self._scale(),
            reduces=not local,
        )
        self._check_hooks(config)
        try:
            result = self._corrected(config, batches, local) if kind == "corrected" else self._plain(config, batches)
            base_norm, g_hat = result.base_norm, result.g_hat
            if kind == "reused":
                g_hat = {p: g.add_(self._correction[p]) if p in self._correction else g for p, g in g_hat.items()}
            norm = base_norm if kind == "plain" else gradients.local_norm(self._parallel, config.params, g_hat)
            scalars = self._reduced(result, norm, local)
            self.info = info = Info.read(result.weight * self._parallel.count, *scalars)
            if info.skipped:
                self._explain(config, batches)
        except BaseException:
            passes.clear_gradients(config)
            self._parallel.reset()
            raise
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

    def _update(self, g_hat: Gradients, clip: float, skipped: bool) -> None:
        if self._scaler is not None:
            gradients.write(self._scaled(g_hat, clip, skipped), self._sparse)
            for optimizer in self._optimizers:
                self._scaler.step(optimizer)
            self._scaler.update()
        elif not skipped:
            fused = [one for one in self._optimizers if isinstance(one, AdamW)]
            in_optimizer = len(fused) == len(self._optimizers)
            gradients.write(g_hat if in_optimizer else self._scaled(g_hat, clip, False), self._sparse)
            how: dict[str, Any] = {"clip": clip} if in_optimizer else {}
            for optimizer in self._optimizers:
                optimizer.step(**how)
            if in_optimizer:
                self._weights.mark_synced()  # it has written the copies of its masters
        if skipped:
            for p in self._params():
                p.grad = None

    def _scale(self) -> float | Tensor:
        """What cotangents are multiplied by."""
        if self._scaler is not None:
            device = next(self._parallel.inner.parameters()).device
            return self._scaler.scale(torch.ones((), device=device))
        return 1.0 if self._scaling is None else self._scaling.scale

    def _scaled(self, g_hat: Gradients, clip: float, skipped: bool) -> Gradients:
        """ĝ, clipped, in place, and as the scaler expects it."""
        if skipped:  # each optimizer is to skip, also where its own part of ĝ is finite
            return {p: torch.full_like(g, torch.inf) for p, g in g_hat.items()}
        if clip != 1:
            torch._foreach_mul_(list(g_hat.values()), clip)
        if self._scaler is not None:
            torch._foreach_mul_(list(g_hat.values()), self._scale())
        return g_hat

    def _check_hooks(self, config: PassConfig) -> None:
        hooked = [p for p in (*config.params, *self._weights.copies.values()) if p._post_accumulate_grad_hooks]
        if hooked:
            raise UserError(
                f"model: {len(hooked)} parameters have post-accumulate-grad hooks, which would run in every pass of a "
                "step; remove them, and act on .grad after step.gradient(batch)"
            )

    def _explain(self, config: PassConfig, batches: list[Any]) -> None:
        """Raise for labels and weights that cannot be right; on a CPU the pass itself has done so."""
        if all(p.device.type == "cpu" for p in config.params):
            return
        with torch.no_grad(), self._replay.replayed():
            for batch in batches:
                heads.flat(config.parallel.call_features(config.features, batch), "now")


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
        found = heads.flat(parallel.call_features(features, batch))
        weight = parallel.mean(found[0].count)
        unit = torch.where(weight > 0, weight, 1)
        every = zip(found, cotangents.divisors(found, unit), strict=True)
        losses = [cotangents.cotangent(ops, head, by, memory, gradient=False)[0] for head, by in every]
        return parallel.mean(torch.stack(losses).sum())

    return loss
