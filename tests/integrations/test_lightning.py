"""The step in Lightning: accumulation, schedules, clipping, bf16, resumption, and what is refused."""

from __future__ import annotations

import dataclasses

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchdata.stateful_dataloader import StatefulDataLoader

from fsam_core.errors import UserError
from fsam_core.torch import FunctionalSAM
from fsam_core.torch.from_model import from_model
from fsam_trainers.integrations.lightning import KEY, NEVER_CALLED, FsamMixin, StepSettings
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


def test_hooks_of_the_module_behind_the_mixin_run(tmp_path):
    called = []

    class Own(lightning_module()):
        def on_train_start(self):
            called.append("start")

        def on_train_epoch_end(self):
            called.append("epoch end")

        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 1

        def on_load_checkpoint(self, checkpoint):
            called.append(checkpoint["own"])

    class Model(FsamMixin, Own):
        def configure_step(self):
            return StepSettings(METHOD, from_model("lm_head", shift=True))

    trainer = lightning_trainer(max_epochs=1)
    trainer.fit(Model(), loader(2))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    Model.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=False)
    assert called == ["start", "epoch end", 1]


def test_weights_of_a_checkpoint_begin_a_new_run(tmp_path):
    """`load_from_checkpoint` takes neither the step's count nor the micro-batches of an unfinished step."""
    save = SaveAfter(tmp_path / "half.ckpt", 3)
    lightning_trainer(max_epochs=1, callbacks=[save]).fit(module(accumulate=4), loader(4))
    assert len(torch.load(tmp_path / "half.ckpt", weights_only=False)[KEY]["collected"]) == 3
    model = module(accumulate=2)
    model.on_load_checkpoint(torch.load(tmp_path / "half.ckpt", weights_only=False))
    lightning_trainer(max_epochs=1).fit(model, loader(2))
    assert model.fsam_step.steps == 1


def test_checkpoint_of_a_plain_run_counts_its_steps(tmp_path):
    class Plain(lightning_module()):
        def training_step(self, batch, batch_idx):
            return self(**batch).loss

    before = lightning_trainer(max_epochs=1)
    before.fit(Plain(), loader(3))
    before.save_checkpoint(tmp_path / "plain.ckpt")
    model = module(accumulate=1)
    lightning_trainer(max_epochs=2).fit(model, loader(3), ckpt_path=tmp_path / "plain.ckpt")
    assert model.fsam_step.steps == 6


def test_schedules_are_the_modules_and_need_no_value_that_lightning_drops():
    def plateau(params):
        optimizer = torch.optim.SGD(params, lr=1.0)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss"}}

    with pytest.raises(UserError, match=r"ReduceLROnPlateau needs a value, .* override lr_scheduler_step"):
        lightning_trainer(max_epochs=1).fit(module(optimizer=plateau), loader(2))
    seen = []

    class Own(type(module())):
        def configure_optimizers(self):
            return plateau(self.parameters())

        def lr_scheduler_step(self, scheduler, metric):
            seen.append(float(self.trainer.callback_metrics["train_loss"]))
            scheduler.step(seen[-1])

    model = Own()
    lightning_trainer(max_epochs=2).fit(model, loader(2))
    assert len(seen) == 2


def test_skipped_step_moves_no_schedule():
    def halving(params):
        optimizer = torch.optim.SGD(params, lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}

    model = module(optimizer=halving, accumulate=1)
    features = from_model("lm_head", shift=True)

    def broken(module, batch):
        head = features(module, batch)
        bad = module.fsam_step.steps + module.fsam_step.skipped_steps == 1
        return dataclasses.replace(head, hidden=head.hidden * torch.nan) if bad else head

    model.configure_step = lambda: StepSettings(METHOD, broken)
    trainer = lightning_trainer(max_epochs=1)
    trainer.fit(model, loader(3))
    assert (model.fsam_step.steps, model.fsam_step.skipped_steps) == (2, 1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_averaged_weights_are_not_trained_on_while_batch_norms_are_counted():
    class Normed(lightning_module()):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(32)
            self.model.model.norm.register_forward_hook(lambda module, given, out: self.norm(out.mT).mT)

    class Model(FsamMixin, Normed):
        def configure_step(self):
            return StepSettings(METHOD, from_model("lm_head", shift=True))

    class Seen(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            seen.append((weights(module), module.norm.running_mean.clone()))

    seen, model = [], Model()
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    lightning_trainer(max_epochs=2, callbacks=[averaging, Seen()]).fit(model, loader(2))
    (averaged, mean), found = seen[-1], weights(model)
    assert len(seen) == 3
    assert model.fsam_step.steps == 4
    assert all(torch.equal(x, found[name]) for name, x in averaged.items())
    assert not torch.equal(mean, model.norm.running_mean)


def test_learning_rate_finder_sees_the_losses(tmp_path):
    class Model(type(module(accumulate=1))):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    trainer = lightning_trainer(max_epochs=1, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(Model(), loader(8), num_training=8, max_lr=1.0).results
    assert len(found["loss"]) == 8
    assert all(loss > 0 for loss in found["loss"])


@pytest.mark.parametrize("hook", NEVER_CALLED)
def test_hooks_that_nothing_would_call_are_refused(hook):
    class Own(type(module())):
        pass

    setattr(Own, hook, lambda self, *args, **kwargs: None)
    with pytest.raises(UserError, match=rf"Own\.{hook}: nothing calls it"):
        lightning_trainer().fit(Own(), loader(2))


def test_restored_micro_batches_go_to_the_modules_device(tmp_path):
    class Own(type(module(accumulate=4))):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            moved.append(device)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    moved = []
    save = SaveAfter(tmp_path / "half.ckpt", 3)
    lightning_trainer(max_epochs=1, callbacks=[save]).fit(Own(), loader(4))
    assert len(moved) == 4
    lightning_trainer(max_epochs=1).fit(Own(), loader(4), ckpt_path=tmp_path / "half.ckpt")
    assert len(moved) == 4 + 3 + 1


def test_compiled_module_takes_the_same_step():
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = module()
        lightning_trainer().fit(wrap(model), loader(2))
        results.append(weights(model))
    assert all(torch.allclose(x, results[1][name], atol=1e-7) for name, x in results[0].items())
