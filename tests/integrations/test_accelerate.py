"""The step with Accelerate: bf16, schedules, resumption, and the guard against gradients that would vanish."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from fsam_core.errors import UserError
from fsam_core.torch import FunctionalSAM, MicroBatches
from fsam_core.torch.from_model import from_model
from fsam_trainers.integrations.accelerate import AcceleratedStep
from integrations import causal_reference, rows
from integrations_models import error, llama, moved, token_batches, weights

FEATURES = from_model("lm_head", shift=True)
METHOD = FunctionalSAM(rho=0.1)
ADAM = FunctionalSAM(rho=0.1, precondition="adam", ascent="previous")


def prepared(optimizer=torch.optim.SGD, method=METHOD, lr=1.0, **options):
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = llama()
    model, optimizer = accelerator.prepare(model, optimizer(model.parameters(), lr=lr))
    return accelerator, model, AcceleratedStep(accelerator, model, optimizer, method, features=FEATURES, clip_norm=0.5)


def test_bf16_is_that_of_the_model_under_autocast():
    batches = token_batches()
    _, model, step = prepared(mixed_precision="bf16")
    clean = llama()
    clean.load_state_dict(model.state_dict())
    plain, before = causal_reference(clean, batches), weights(model)
    assert FEATURES(model, batches[0]).hidden.dtype == torch.bfloat16
    step(MicroBatches(batches))
    assert 1e-4 < error(moved(before, model), plain) < 0.05


def test_gradient_leaves_the_update_to_the_prepared_optimizer():
    accelerator, model, step = prepared()
    expected, before = causal_reference(model, token_batches()), weights(model)
    step.gradient(MicroBatches(token_batches()))
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    accelerator._optimizers[0].step()
    assert error(moved(before, model), expected) < 1e-5


@pytest.mark.parametrize("method", ["__call__", "gradient"])
def test_step_under_accumulate_is_refused(method):
    accelerator, model, step = prepared()
    accelerator.gradient_state.plugin_kwargs["num_steps"] = 2  # as a change after the step was made
    before = weights(model)
    with accelerator.accumulate(model), pytest.raises(UserError, match=r"accelerator.accumulate.*MicroBatches"):
        getattr(step, method)(token_batches()[0])
    assert step.steps == 0
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


def test_accumulating_accelerator_is_refused():
    with pytest.raises(UserError, match="gradient_accumulation_steps=2"):
        prepared(gradient_accumulation_steps=2)


def test_scaler_and_shards_are_refused():
    accelerator, model, _ = prepared()
    accelerator.scaler = object()
    with pytest.raises(UserError, match="fp16"):
        AcceleratedStep(accelerator, model, accelerator._optimizers[0], METHOD, features=FEATURES)
    accelerator.scaler = None
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(UserError, match="DEEPSPEED is not supported"):
        AcceleratedStep(accelerator, model, accelerator._optimizers[0], METHOD, features=FEATURES)


def test_prepared_schedule_goes_on_a_step():
    accelerator, _, step = prepared()
    optimizer = accelerator._optimizers[0]
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda n: 0.5**n))
    for batch in token_batches():
        step(batch)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_resumed_run_ends_in_the_same_weights(tmp_path):
    batches = token_batches(4)

    def begin():
        accelerator, model, step = prepared(torch.optim.AdamW, ADAM, lr=1e-2)
        accelerator.register_for_checkpointing(step)
        return accelerator, model, step

    accelerator, expected, step = begin()
    for i, batch in enumerate(batches):
        if i == 2:
            accelerator.save_state(str(tmp_path))
        step(batch)
    accelerator, found, step = begin()
    accelerator.load_state(str(tmp_path))
    assert step.steps == 2
    for batch in batches[2:]:
        step(batch)
    assert all(torch.equal(x, weights(expected)[name]) for name, x in weights(found).items())


def test_loader_feeds_the_step():
    accelerator, _, step = prepared()
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows(token_batches()), batch_size=2))
    for batch in loader:
        step(batch)
    assert step.steps == 2
