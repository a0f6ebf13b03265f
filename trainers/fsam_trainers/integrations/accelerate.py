"""The step with Accelerate: a `Step` that refuses where Accelerate would drop gradients.

model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
step = AcceleratedStep(accelerator, model, optimizer, method, features=from_model("lm_head", shift=True))
accelerator.register_for_checkpointing(step)
for batch in loader:
    loss = step(batch)
    scheduler.step()
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.methods import Method
from fsam_core.torch import Step

ONE_MODEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
"""Accelerate's kinds of distribution in which every process has the whole model."""


class AcceleratedStep(Step):
    """A `Step` on what `accelerator.prepare` returned.

    Give several micro-batches as `MicroBatches`. Under `accelerator.accumulate` a prepared optimizer does nothing in
    all but the last micro-batch, and the step's gradient does not stay in `.grad`: that of the others would vanish.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, method: Method, **options: Any):
        """
        Args:
            accelerator: without fp16; for bf16 the features must call the whole model, as `from_model` does.
            model, optimizer: prepared; a list of optimizers is one, too.
            method, options: those of `Step`.

        Raises:
            UserError: for an accelerator that accumulates gradients, scales losses or shards the model.
        """
        count = accelerator.gradient_accumulation_steps
        if count != 1:
            raise UserError(
                f"accelerator: with gradient_accumulation_steps={count} the optimizer skips steps; leave it at 1 and "
                "give the step MicroBatches([...])"
            )
        if accelerator.scaler is not None:
            raise UserError("accelerator: mixed_precision='fp16' scales losses that are not computed; use 'bf16'")
        if accelerator.distributed_type not in ONE_MODEL:
            raise UserError(
                f"accelerator: {accelerator.distributed_type.value} is not supported; use one device, or "
                "DistributedDataParallel on several"
            )
        prepared: Any = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        super().__init__(model, [getattr(one, "optimizer", one) for one in prepared], method, **options)
        self._accelerator = accelerator

    def __call__(self, batch: Any) -> Tensor:
        self._check_syncs()
        return super().__call__(batch)

    def gradient(self, batch: Any, **options: Any) -> Tensor:
        self._check_syncs()
        return super().gradient(batch, **options)

    def _check_syncs(self) -> None:
        if not self._accelerator.sync_gradients:
            raise UserError(
                "accelerator.accumulate: the optimizer would not step on this batch, and its gradient would vanish; "
                "call the step outside, with MicroBatches([...])"
            )
