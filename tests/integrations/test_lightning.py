"""The step in Lightning: accumulation, schedules, clipping, bf16, resumption, and what is refused."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchdata.stateful_dataloader import StatefulDataLoader

from fsam_core.errors import UserError
from fsam_core.torch import FunctionalSAM
from fsam_core.torch.from_model import from_model
from fsam_trainers.integrations.lightning import KEY, FsamMixin, StepSettings
from integrations import causal_reference, lightning_module, lightning_trainer, rows
from integrations_models import error, moved, token_batches, weights

METHOD = FunctionalSAM(rho=0.1)
ADAM = FunctionalSAM(rho=0.1, precondition="adam", fraction=1 / 2)


def module(method=METHOD, optimizer=None, **options):
    """A LightningModule of Llama, two micro-batches a step."""
    settings = {"accumulate": 2, "clip_norm": 0.5, **options}

    class Model(FsamMixin, lightning_module()):
        def configure_step(self):
            return StepSettings(method, from_model("lm_head", shift=True), **settings)

        def configure_optimizers(self):
            return optimizer(self.parameters()) if optimizer else super().configure_optimizers()

    torch.manual_seed(0)
    return Model()


def loader(count):
    """Lightning resumes in the middle of an epoch with a loader that has a state."""
    return StatefulDataLoader(rows(token_batches(count)), batch_size=2)


def test_last_step_of_an_epoch_takes_the_micro_batches_that_are_left():
    model, trainer = module(), lightning_trainer(max_epochs=2)
    trainer.fit(model, loader(3))
    assert model.fsam_step.steps == trainer.global_step == 4
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(model.fsam_step.info.loss)


def test_schedules_go_on_a_step_or_an_epoch():
    def adamw(interval):
        def configure(params):
            optimizer = torch.optim.SGD(params, lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

        return configure

    for interval, times in (("step", 4), ("epoch", 2)):
        model, trainer = module(optimizer=adamw(interval)), lightning_trainer(max_epochs=2)
        trainer.fit(model, loader(4))
        assert model.optimizers().param_groups[0]["lr"] == 0.5**times


def test_bf16_is_that_of_the_model_under_autocast():
    model, batches = module(), token_batches()
    plain, before = causal_reference(model.model, batches), weights(model.model)
    lightning_trainer(precision="bf16-mixed").fit(model, loader(2))
    assert 1e-4 < error(moved(before, model.model), plain) < 0.05


class SaveAfter(lightning.Callback):
    """Saves a checkpoint after so many micro-batches."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "batches", [3, pytest.param(4, marks=pytest.mark.slow)], ids=["between two micro-batches", "after a step"]
)
def test_resumed_run_ends_in_the_same_weights(tmp_path, batches):
    def run(resume=None, **options):
        model = module(ADAM, lambda params: torch.optim.AdamW(params, lr=1e-2))
        lightning_trainer(**options).fit(model, loader(8), ckpt_path=resume)
        return model

    expected = run(callbacks=[SaveAfter(tmp_path / "half.ckpt", batches)])
    assert len(torch.load(tmp_path / "half.ckpt", weights_only=False)[KEY]["collected"]) == batches % 2
    found = run(tmp_path / "half.ckpt")
    assert found.fsam_step.steps == expected.fsam_step.steps == 4
    assert all(torch.equal(x, weights(expected)[name]) for name, x in weights(found).items())


def test_step_that_is_not_finite_changes_nothing():
    model = module()
    with torch.no_grad():
        model.model.lm_head.weight[0] = float("inf")
    before = weights(model)
    lightning_trainer().fit(model, loader(2))
    assert model.fsam_step.skipped_steps == 1
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


def test_automatic_optimization_is_refused():
    model = module()
    model.automatic_optimization = True
    with pytest.raises(UserError, match="automatic_optimization"):
        lightning_trainer(accumulate_grad_batches=2).fit(model, loader(2))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_accumulation_and_clipping_of_lightning_itself_are_refused(options):
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        lightning_trainer(**options).fit(module(), loader(2))


def test_accumulate_below_one_is_refused():
    with pytest.raises(UserError, match="accumulate must be >= 1, got 0"):
        lightning_trainer().fit(module(accumulate=0), loader(2))
