"""The step in torchtitan's own `train_step`, which keeps clipping, the optimizer, schedules, metrics and checkpoints.

class Trainer(FsamMixin, torchtitan.train.Trainer):
    method = FunctionalSAM(rho=0.5, precondition="adam")

torchtitan.train.main(Trainer)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.methods import Method
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.torch import MicroBatches, Step
from fsam_core.torch.from_model import from_model

HEAD = "output"
"""The head's name in torchtitan's language models."""


class FsamMixin:
    """In front of torchtitan's `Trainer`, for models whose loss is cross entropy.

    `train_step` calls `forward_backward_step` once a micro-batch; they are kept until the last, and make one step
    together. The step's state is saved with torchtitan's.

    Attributes:
        method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
        schedule: the steps that have a correction.
        fsam_step: the `Step`, made at its first use.
    """

    method: Method
    schedule: Schedule = ALWAYS
    _fsam_step: Step | None = None
    _collected: tuple[Any, ...] = ()

    @property
    def fsam_step(self) -> Step:
        if self._fsam_step is None:
            self._fsam_step = self._make_step()
        return self._fsam_step

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """The mean loss with the last micro-batch, 0 with the others: `train_step` adds them up."""
        trainer: Any = self
        step = self.fsam_step
        self._collected = (*self._collected, trainer.post_dataloading_process(input_dict, labels))
        if len(self._collected) < trainer.gradient_accumulation_steps:
            return torch.zeros((), device=labels.device)
        batches, self._collected = MicroBatches(self._collected), ()
        with trainer.train_context():
            return step.gradient(batches)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "fsam": self.fsam_step.state_dict()}  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self.fsam_step.load_state_dict(state_dict["fsam"])

    def _make_step(self) -> Step:
        trainer: Any = self
        dims = trainer.parallel_dims
        if dims.pp_enabled:
            raise UserError("pipeline parallelism: a stage has no loss to perturb by; use degree 1")
        if dims.world_size > 1:
            raise UserError(
                f"parallelism: got {dims.world_size} ranks, but torchtitan sums their gradients and shards the head "
                "apart from the root; use 1, or Step with fully_shard (docs/scale.md)"
            )
        features = from_model(HEAD, labels=1, call=self._call)
        return Step(
            trainer.model_parts[0], trainer.optimizers.optimizers, self.method, features=features,
            schedule=self.schedule, clip_norm=trainer.job_config.training.max_norm or None,
        )  # fmt: skip

    def _call(self, model: nn.Module, batch: Any) -> Any:
        inputs, _, extra_inputs, extra_kwargs = batch
        with self.maybe_enable_amp:  # type: ignore[attr-defined]
            return model(inputs, **extra_inputs, **extra_kwargs)
