"""The step inside transformers' `Trainer`, which keeps clipping, logging, schedule, mixed precision and checkpoints.

    trainer = FsamTrainer(model, args, train_dataset=data, method=FunctionalSAM(rho=0.5, precondition="adam"))
    trainer.train()

`FsamMixin` goes in front of another Trainer: `class Mine(FsamMixin, Seq2SeqTrainer): pass`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, has_length

from fsam_core import split
from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed
from fsam_core.schedules import ALWAYS, Schedule
from fsam_core.torch import MicroBatches, Step
from fsam_core.torch.check import check
from fsam_core.torch.pass_config import Features
from fsam_trainers.integrations.accelerate import ONE_MODEL
from fsam_trainers.integrations.hf_models import features_of

FILE = "fsam.pt"


class FsamMixin:
    """In front of a `Trainer`: its training steps become those of `method`.

    Micro-batches are kept until the Trainer would sync its gradients, and make one step together: each label has the
    same weight, whatever micro-batch it is in. Evaluation stays as it is. A step that is not finite leaves no
    gradients, so the optimizer changes nothing.

    Attributes:
        fsam_step: the `Step`, from the beginning of `train` on; its `info` has the figures of the last step.
    """

    fsam_step: Step

    def __init__(
        self,
        *args: Any,
        method: Method,
        features: Features | None = None,
        schedule: Schedule = ALWAYS,
        check_first: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
            features: None for those of `features_of(model)`.
            schedule: the steps that have a correction.
            check_first: whether the features' loss and gradient are compared with `compute_loss` on the first
                micro-batch, which takes the memory of the Trainer's own step once.
        """
        super().__init__(*args, **kwargs)
        self._fsam: dict[str, Any] = {"method": method, "features": features, "schedule": schedule}
        self._to_check = check_first
        self._collected: list[Any] = []
        self._resumed: str | None = None
        self.add_callback(_State(self))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        last = (
            get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        self._resumed = str(last) if last else None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        trainer: Any = self
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()  # schedule-free ones have other weights in an evaluation
        batch = trainer._prepare_inputs(inputs)
        with trainer.compute_loss_context_manager():
            if self._to_check and _has_labels(batch):
                own_loss = lambda model, batch: trainer.compute_loss(model, dict(batch))
                check(model, self.fsam_step.features, own_loss, batch)
                self._to_check = False
            self._collected.append(batch)
            if not trainer.accelerator.sync_gradients:
                return torch.zeros((), device=trainer.args.device)
            batches, self._collected = MicroBatches(self._collected), []
            return self.fsam_step.gradient(batches)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The step's state goes with theirs: into the folder of a search's trial, and before that is pushed."""
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            torch.save(self.fsam_step.state_dict(), Path(output_dir) / FILE)

    def _begin(self) -> None:
        """Make the step, when model and optimizer are prepared, and restore it."""
        trainer: Any = self
        accelerator, args = trainer.accelerator, trainer.args
        if accelerator.distributed_type not in ONE_MODEL or args.n_gpu > 1:
            kind = "DataParallel" if args.n_gpu > 1 else accelerator.distributed_type.value
            raise UserError(f"Trainer: {kind} is not supported; train on one device, or on several under torchrun")
        if accelerator.scaler is not None:
            raise UserError("fp16: the Trainer would unscale a gradient that was never scaled; use bf16=True")
        behind = super().training_step  # type: ignore[misc]
        if behind.__func__ is not Trainer.training_step:
            raise UserError(
                f"Trainer: {behind.__qualname__} would never be called, as the step takes its place; override it in a "
                "class in front of FsamMixin, or set training_step = Trainer.training_step where it may be left out"
            )
        if trainer.compute_loss_func is not None and self._fsam["features"] is None:
            raise UserError("compute_loss_func: give the features of that loss, too; got features=None")
        options = dict(self._fsam)
        options["features"] = options["features"] or features_of(
            accelerator.unwrap_model(trainer.model), label_smoothing=args.label_smoothing_factor
        )
        # Ranks are given as many rows each; a batch size that is yet to be found may be any.
        if args.world_size == 1 and not args.auto_find_batch_size and has_length(trainer.train_dataset):
            _check_last_step(options["method"], args, len(trainer.train_dataset), trainer.state.max_steps)
        optimizer = trainer.optimizer
        self._collected = []
        # The Trainer clips by itself; the step is told, as v̂ holds the clipped gradient.
        options["clip_norm"] = args.max_grad_norm or None
        self.fsam_step = Step(trainer.model_wrapped, getattr(optimizer, "optimizer", optimizer), **options)
        if self._resumed is not None:
            # A checkpoint of a plain Trainer has no such file; its steps count all the same.
            path, state = Path(self._resumed) / FILE, {"steps": trainer.state.global_step, "skipped_steps": 0}
            self.fsam_step.load_state_dict(torch.load(path, map_location="cpu") if path.exists() else state)


def _check_last_step(method: Method, args: Any, rows: int, max_steps: int) -> None:
    """Refuse at the beginning what would end the run after an epoch: a last step of rows that cannot be cut."""
    if not isinstance(method, Perturbed):
        return
    size, parts = args.train_batch_size, args.gradient_accumulation_steps
    batches = [size] * (rows // size) + [rows % size] * (rows % size > 0 and not args.dataloader_drop_last)
    if max_steps < math.ceil(len(batches) / parts):
        return
    last = batches[(len(batches) - 1) // parts * parts :]
    try:
        split.split([torch.empty(n, 1) for n in last], method.cut_at, _pytree.tree_map)
    except UserError as error:
        raise UserError(
            f"train_dataset: the last step of an epoch has {' + '.join(map(str, last))} of its {rows} rows; give "
            f"dataloader_drop_last=True, or a size that can be cut ({error})"
        ) from None


def _has_labels(batch: Any) -> bool:
    """Whether there is anything to compare: a mean over no label is NaN in the model's own loss."""
    labels = batch.get("labels")
    return labels is None or bool((labels[..., 1:] if labels.ndim > 1 else labels).ge(0).any())


class FsamTrainer(FsamMixin, Trainer):
    """`Trainer` with the steps of `method`."""


class _State(TrainerCallback):
    """Makes the step when training begins."""

    def __init__(self, trainer: FsamMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin()
