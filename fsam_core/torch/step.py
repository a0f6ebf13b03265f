"""The step in PyTorch: `Step`, which replaces forward, backward and `optimizer.step()`. Usage: `fsam_core.torch`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fsam_core import backends, methods, schedules
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed
from fsam_core.regions import in_torch
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.scopes import Blocks
from fsam_core.split import micro_batches
from fsam_core.torch import correction, gradients, optimizers, passes, scope, update
from fsam_core.torch.carried import Carried
from fsam_core.torch.gradient_sum import clear_gradients
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.info import Info, over_ranks
from fsam_core.torch.loss_scale import LossScale, Scaling, check_scaling
from fsam_core.torch.parallel import Sync, detect_parallelism
from fsam_core.torch.pass_config import Features, PassConfig
from fsam_core.torch.perturbation import StepInputs, StepResult
from fsam_core.torch.replay import Replay
from fsam_core.torch.staged import SharedPrefix, Staged
from fsam_core.torch.update import Found, Verdict
from fsam_core.torch.weights import Weights
from fsam_kernels.memory import AUTO, Memory
from fsam_kernels.torch.adamw import AdamW

MOST_UNREAD = 2  # steps whose figures, and with them batches, may wait on the device for the host


class Step:
    """One optimizer step of `method`, which replaces forward, backward and `optimizer.step()`; `ops` is its backend.

    Where the optimizers can clip and skip by tensors on a GPU, the host waits for nothing between backward pass and
    update. It waits where `info`, `steps` or `skipped_steps` is read, and for the step before the last but one. A label
    or weight that cannot be right is then reported by whichever of these comes first.
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
            UserError: for a parameter that moves and has no second moment, or is in two optimizers; maximize=True,
                clip_norm ≤ 0, an unknown backend, a scope or schedule that does not fit the rest, a loss scale without
                masters or beside a scaler, or an unknown wrapper of the model.
        """
        methods.check_method(method)
        methods.check_clip_norm(clip_norm)
        schedules.check(schedule, method)
        parallel = detect_parallelism(model)
        if sync not in get_args(Sync):
            raise UserError(f"sync: {sync!r} is not known; use 'global' or 'local'")
        if sync == "local" and parallel.why_not_local:
            raise UserError(
                f"sync: 'local' needs each rank's own gradient, {parallel.why_not_local}; use sync='global'"
            )
        self._optimizers = optimizers.as_tuple(optimizer, scope.names_of(parallel.inner, {}))
        copies = optimizers.copies(self._optimizers)
        if copies and parallel.sharded:
            raise UserError(
                "optimizer: shards of weights are the masters themselves; leave `copies` out and give fully_shard "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
            )
        check_scaling(loss_scale, scaler, bool(copies))
        self.model, self.optimizer, self.method, self.schedule = model, optimizer, method, schedule
        self.features, self.memory, self.clip_norm = features, memory, clip_norm
        self._steps = self._skipped_steps = 0
        self._info: Info | None = None
        self._unread: tuple[Found, ...] = ()  # steps whose figures are still on the device
        chosen = backends.choose("torch", backend)
        for device in sorted({p.device.type for p in model.parameters()}):
            backends.check_device(chosen.name, device)
        self.ops = backends.load("torch", chosen.name)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scaling = None if loss_scale is None else Scaling.begin(loss_scale)
        self._parallel, self._weights = parallel, Weights(parallel, copies)
        self._replay = Replay(parallel.inner)
        self._local = sync == "local" and parallel.count > 1
        self._carried = Carried(method, schedule)
        embeddings = (m for m in parallel.inner.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        self._sparse = {m.weight for m in embeddings if m.sparse}
        self._blocks = blocks
        self._outside: set[Any] = set()
        self._known: list[Any] = []  # the optimizers' tensors when it was found out which of them move
        self._shares_prefix: SharedPrefix | None = None
        self._find_moving()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("model", "optimizer", "method") and name in self.__dict__:
            raise UserError(
                f"step.{name} is fixed; make a new Step with another, or give rho as a function of the step"
            )
        super().__setattr__(name, value)

    @property
    def info(self) -> Info | None:
        """The results of the last step, None before the first."""
        self._read_figures(wait=True)
        return self._info

    def last(self) -> tuple[Callable[[], Info], bool | Tensor]:
        """(what waits for the results of the last step, also once the next has begun; whether that step was skipped).

        The second is a scalar on the device, 1.0 for a skipped step, where the host does not know it yet.

        Raises:
            UserError: before the first step.
        """
        if self._unread:
            figures = self._unread[-1].figures

            def read() -> Info:
                info = figures.read()
                self._read_figures(wait=False)
                return info

            return read, figures.not_finite
        info = self._info
        if info is None:
            raise UserError("last() is of a step that was taken; call the step first")
        return (lambda: info), info.skipped

    @property
    def steps(self) -> int:
        """Completed optimizer steps; the argument of every schedule."""
        self._read_figures(wait=True)
        return self._steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._read_figures(wait=True)
        self._steps = count

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because something was not finite. The optimizer does not count them."""
        self._read_figures(wait=True)
        return self._skipped_steps

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle` and `copy.deepcopy`: the copy is a step of a copied model and copied optimizers."""
        self._read_figures(wait=True)
        return self.__dict__ | {"ops": self.ops.__name__}  # a module cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"ops": importlib.import_module(state["ops"])})

    def __call__(self, batch: Any) -> Tensor:
        """Take one step; returns the mean loss at θ, detached.

        `batch` is what `features` takes, whatever the loader gives. The gradient of `MicroBatches([...])` is that of
        one batch of them all, in which each token has the same weight. `.grad` is ĝ afterwards, and None if the host
        knows that the step was skipped; what it was before is lost. If a pass raises, weights and optimizer state are
        as before.

        Raises:
            UserError: for what the step cannot do right with this batch, and in `torch.inference_mode`.
        """
        on_device = self._stays_on_device()
        try:
            found = self._gradient(batch, read=not on_device)
            with in_torch("update"):
                self._update(found.g_hat, update.verdict(found, self.clip_norm))
        finally:
            self._weights.sync_from_masters()
        self._note(found)
        return found.loss

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
        before = {p: p.grad for p in optimizers.params(self._optimizers) if p.grad is not None} if keep_grad else {}
        try:
            found = self._gradient(batch, read=True)
            verdict = update.verdict(found, self.clip_norm if clip else None)
            if self._scaler is not None:
                gradients.write(update.for_scaler(found.g_hat, verdict, self._scale()), self._sparse)
            elif not verdict.skip:
                gradients.write(update.clipped(found.g_hat, verdict.clip), self._sparse)
        finally:
            self._weights.sync_from_masters()
            for p, grad in before.items():
                p.grad = grad if p.grad is None else p.grad + grad
        self._note(found)
        return found.loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model's and the optimizer's own state.

        Two counts, and the loss scale where there is one; one tensor for each parameter with an ascent that remembers,
        and with between="reuse"; two norms with norm_from="previous".
        """
        state: dict[str, Any] = {"steps": self.steps, "skipped_steps": self.skipped_steps}
        if self._scaling is not None:
            state["loss_scale"] = self._scaling.state()
        return state | self._carried.state_dict(optimizers.params(self._optimizers))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. What a checkpoint of another method does not have starts from zero."""
        self._read_figures(wait=True)
        self._steps, self._skipped_steps = int(state["steps"]), int(state["skipped_steps"])
        if self._scaling is not None and "loss_scale" in state:
            self._scaling.load(state["loss_scale"])
        self._carried.load(state, optimizers.params(self._optimizers))

    def _find_moving(self) -> None:
        """Find out which of the optimizers' tensors the method moves.

        Raises:
            UserError: as `__init__`.
        """
        self._known, method = optimizers.params(self._optimizers), self.method
        if isinstance(method, Perturbed):
            names = scope.names_of(self._parallel.inner, self._weights.copies)
            moving, self._outside = scope.moving(method, self._optimizers, names, self._blocks)
            if isinstance(self.features, Staged):
                self._shares_prefix = SharedPrefix(self.features, self._parallel.inner, method, moving, self._replay)

    @_disable_dynamo  # also where the caller compiles the whole step: the model's graph is one of its own
    @torch.enable_grad()
    def _gradient(self, batch: Any, *, read: bool) -> Found:
        """ĝ and the step's figures, which the host waits for with `read`."""
        passes.check_context()
        self._parallel.check_reduces()
        batches = micro_batches(batch)
        params = optimizers.params(self._optimizers)
        if len(params) != len(self._known) or any(p is not q for p, q in zip(params, self._known, strict=True)):
            self._find_moving()  # the caller has added some
        self._read_figures(wait=read or len(self._unread) >= MOST_UNREAD)
        # Each step that is not read yet may have been skipped; the host waits for them only if the kind depends on it.
        kinds = {self.schedule.kind(self._steps + n) for n in range(len(self._unread) + 1)}
        kind = kinds.pop() if len(kinds) == 1 else self.schedule.kind(self.steps)
        kind = kind if isinstance(self.method, Perturbed) else "plain"
        local = self._local and kind == "corrected"
        config = PassConfig(
            ops=self.ops,
            parallel=self._parallel,
            weights=self._weights,
            features=self.features,
            memory=self.memory,
            params=params,
            optimizers=self._optimizers,
            replay=self._replay if kind == "corrected" else None,
            loss_scale=self._scale(),
            reduces=not local,
        )
        optimizers.check_copies(self._optimizers)
        optimizers.check_hooks([*config.params, *self._weights.copies.values()])
        try:
            result = self._corrected(config, batches, local) if kind == "corrected" else self._plain(config, batches)
            base_norm, g_hat = result.base_norm, result.g_hat
            if kind == "reused":
                g_hat = self._carried.reused(self._parallel, g_hat)
            norm = base_norm if kind == "plain" else gradients.local_norm(self._parallel, config.params, g_hat)
            loss, norm, figures, norms = over_ranks(self._parallel, result, norm, local=local)
            found = Found(loss, g_hat, norm, figures, config, batches, figures.read() if read else None)
            if found.info is not None and found.info.skipped:
                update.explain(found, self._replay)
        except BaseException:
            clear_gradients(config)
            self._parallel.reset()
            raise
        if found.info is not None:
            if self._scaling is not None:
                self._scaling.seen(found.info.skipped)
            if not found.info.skipped:
                self._carried.update(result, g_hat, norms)
        return found

    def _stays_on_device(self) -> bool:
        """Whether nothing between backward pass and update needs a figure on the host."""
        if any((self._scaler, self._scaling, self._sparse, self._carried.keeps)):
            return False
        return update.can_stay_on_device(self._optimizers, optimizers.params(self._optimizers), self._parallel.sharded)

    def _note(self, found: Found) -> None:
        """Count a step that has ended, or have it counted when its figures are read."""
        if found.info is None:
            self._unread = (*self._unread, found._replace(g_hat={}))
        else:
            self._count(found.info)

    def _count(self, info: Info) -> None:
        self._info = info
        self._skipped_steps += info.skipped
        self._steps += not info.skipped

    def _read_figures(self, wait: bool) -> None:
        """Read the figures of steps that were decided on the device: all, or those that have arrived."""
        while self._unread and (wait or self._unread[0].figures.has_arrived()):
            found, *others = self._unread
            self._unread = tuple(others)
            info = found.figures.read()
            self._count(info)
            if info.skipped:
                update.explain(found, self._replay)

    def _plain(self, config: PassConfig, batches: list[Any]) -> StepResult:
        g_B, base = passes.loss_and_grad(config, batches)
        norm = gradients.local_norm(self._parallel, gradients.with_gradient(g_B), g_B)
        return StepResult(g_B, base.loss, None, base.weight, norm, None)

    def _corrected(self, config: PassConfig, batches: list[Any], local: bool) -> StepResult:
        assert isinstance(self.method, Perturbed)
        inputs = StepInputs(
            config=config,
            method=self.method,
            completed=lambda: self.steps,
            clip_norm=self.clip_norm,
            previous=self._carried.previous,
            norms=self._carried.norms,
            outside=self._outside,
            keeps_correction=self._carried.keeps_correction,
            shares_prefix=self._shares_prefix,
        )
        return correction.corrected(inputs, batches, local=local)

    def _update(self, g_hat: Gradients, verdict: Verdict) -> None:
        if self._scaler is not None:
            gradients.write(update.for_scaler(g_hat, verdict, self._scale()), self._sparse)
            for optimizer in self._optimizers:
                self._scaler.step(optimizer)
            self._scaler.update()
        elif verdict.skip is not True:
            update.apply(self._optimizers, g_hat, verdict, self._sparse)
            if all(isinstance(one, AdamW) for one in self._optimizers):
                self._weights.mark_synced()  # they have written the copies of their masters
        if verdict.skip is True:
            for p in optimizers.params(self._optimizers):
                p.grad = None

    def _scale(self) -> float | Tensor:
        """What cotangents are multiplied by."""
        if self._scaler is not None:
            device = next(self._parallel.inner.parameters()).device
            return self._scaler.scale(torch.ones((), device=device))
        return 1.0 if self._scaling is None else self._scaling.scale
