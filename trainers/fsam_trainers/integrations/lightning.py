"""The step in Lightning, by manual optimization.

    class Model(FsamMixin, L.LightningModule):
        def configure_step(self):
            return StepSettings(FunctionalSAM(rho=0.5, precondition="adam"), from_model("lm_head"), accumulate=4)

`forward` and `configure_optimizers` are the module's own. Lightning keeps precision, logging, schedules and
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fsam_core.errors import UserError
from fsam_core.methods import Method
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.torch import MicroBatches, Step
from fsam_core.torch.pass_config import Features

KEY = "fsam"
NEVER_CALLED = (
    "backward",
    "configure_gradient_clipping",
    "on_after_backward",
    "on_before_backward",
    "optimizer_step",
    "optimizer_zero_grad",
)
"""Hooks of a LightningModule that are for automatic optimization, or for a backward pass that Lightning runs."""


@dataclass(frozen=True)
class StepSettings:
    """What `configure_step` returns.

    Attributes:
        method, features, clip_norm, schedule: those of `Step`; `features` is called with the LightningModule.
        accumulate: micro-batches a step; the last step of an epoch takes those that are left.
    """

    method: Method
    features: Features
    accumulate: int = 1
    clip_norm: float | None = None
    schedule: Schedule = ALWAYS


class FsamMixin:
    """In front of `LightningModule`: its training steps become those of a method. It logs `train_loss` a step.

    The step's state and the micro-batches of an unfinished step are part of Lightning's checkpoints. A hook that a
    class in front of this one overrides must call this one's.

    Attributes:
        fsam_step: the `Step`, from the beginning of training on.
    """

    automatic_optimization = False
    fsam_step: Step
    _collected: list[Any]
    _restored: dict[str, Any] | None = None

    def configure_step(self) -> StepSettings:
        """The method and its settings."""
        raise NotImplementedError("configure_step: return a StepSettings")

    def on_train_start(self) -> None:
        super().on_train_start()  # type: ignore[misc]
        module: Any = self
        if self.automatic_optimization:
            raise UserError(
                "automatic_optimization: it drops the step's gradients; leave it False, as the mixin sets it"
            )
        if module.trainer.world_size > 1:
            raise UserError(
                f"Trainer: got {module.trainer.world_size} devices; Lightning's DDP is not supported, use 1"
            )
        if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("precision: '16-mixed' scales losses that are not computed; use 'bf16-mixed'")
        for name in NEVER_CALLED:
            if self._overrides(name):
                raise UserError(
                    f"{type(module).__name__}.{name}: nothing calls it in a step; use StepSettings(clip_norm=...) to "
                    "clip, on_before_optimizer_step to look at gradients, and a schedule to warm up"
                )
        schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
        if not self._overrides("lr_scheduler_step") and any(isinstance(one, ReduceLROnPlateau) for one in schedulers):
            raise UserError(
                "configure_optimizers: ReduceLROnPlateau needs a value, and Lightning drops `monitor` in manual "
                "optimization; override lr_scheduler_step and take it from self.trainer.callback_metrics"
            )
        settings = self.configure_step()
        if settings.accumulate < 1:
            raise UserError(f"accumulate must be >= 1, got {settings.accumulate!r}")
        self._settings, self._collected = settings, []
        self.fsam_step = Step(
            module,
            [one.optimizer for one in self._optimizers()],
            settings.method,
            features=settings.features,
            clip_norm=settings.clip_norm,
            schedule=settings.schedule,
        )
        # A checkpoint may have been loaded for its weights alone, by load_from_checkpoint or for a test.
        if self._restored is not None and module.trainer.ckpt_path is not None:
            self.fsam_step.load_state_dict(self._restored["step"])
            # A checkpoint is loaded onto the CPU.
            self._collected = [
                module.transfer_batch_to_device(batch, module.device, 0) for batch in self._restored["collected"]
            ]
        self._restored = None

    @_disable_dynamo  # of a compiled module the forward pass is compiled by itself
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The step's loss, None for a micro-batch that is kept for it."""
        module: Any = self
        if getattr(module.trainer.fit_loop, "_skip_backward", False):
            # The epoch after the last, in which StochasticWeightAveraging has the batch norms of its weights counted.
            with torch.no_grad():
                self._settings.features(module, batch)
            return None
        self._collected.append(batch)
        if len(self._collected) < self._settings.accumulate and not module.trainer.is_last_batch:
            return None
        batches, self._collected = MicroBatches(self._collected), []
        before = self.fsam_step.steps
        loss = self.fsam_step.gradient(batches, clip=True)
        for optimizer in self._optimizers():
            optimizer.step()  # Lightning's own, which counts global_step
            optimizer.zero_grad()
        module.log("train_loss", loss, prog_bar=True)
        if self.fsam_step.steps > before:
            self._step_schedulers("step", self.fsam_step.steps)
        return loss

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()  # type: ignore[misc]
        self._step_schedulers("epoch", self.current_epoch + 1)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if hasattr(self, "fsam_step"):
            checkpoint[KEY] = {"step": self.fsam_step.state_dict(), "collected": self._collected}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        # A checkpoint of a plain run has no such state; its steps count all the same.
        steps = checkpoint["global_step"] // max(1, len(checkpoint.get("optimizer_states", ())))
        self._restored = checkpoint.get(KEY, {"step": {"steps": steps, "skipped_steps": 0}, "collected": []})

    def _optimizers(self) -> list[Any]:
        """Lightning's wrappers of the module's optimizers."""
        found = self.optimizers()  # type: ignore[attr-defined]
        return found if isinstance(found, list) else [found]

    def _overrides(self, name: str) -> bool:
        """Whether a hook is the module's own, and not Lightning's."""
        return not getattr(type(self), name).__module__.startswith(("lightning.", "pytorch_lightning."))

    def _step_schedulers(self, interval: str, count: int) -> None:
        """What Lightning does by itself in automatic optimization, after so many steps or epochs."""
        module: Any = self
        for config in module.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                module.lr_scheduler_step(config.scheduler, None)
