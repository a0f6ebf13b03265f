"""The step in torchtitan's `train_step`, with its own model, optimizers, schedule and clipping, on one CPU."""

from __future__ import annotations

import pytest
import torch
import torchtitan.train

from fsam_core import FunctionalSAM, Schedule
from fsam_core.errors import UserError
from fsam_trainers.integrations.torchtitan import FsamMixin
from integrations import one_rank, titan_batches, titan_model, titan_trainer
from integrations_models import causal_loss, clipped, error, joined, moved, reference, token_batches, weights


class Trainer(FsamMixin, torchtitan.train.Trainer):
    method = FunctionalSAM(rho=0.1)


def expected_of(model, batches):
    x, labels = joined(batches)["input_ids"], joined(batches)["labels"]
    return clipped(reference(model, lambda model: (model(x),), lambda z: causal_loss(z, labels)))


@pytest.fixture
def rank():
    with one_rank():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return titan_model()


def test_logged_loss_is_the_mean_over_all_labels(rank, model):
    x, labels = joined(token_batches())["input_ids"], joined(token_batches())["labels"]
    expected = float(causal_loss(model(x), labels).detach())
    trainer = titan_trainer(Trainer, model)
    trainer.train_step(iter(titan_batches()))
    (figures,) = trainer.logged
    assert figures[1] == pytest.approx(expected, rel=1e-6)
    assert figures[3] == pytest.approx(trainer.fsam_step.info.grad_norm, rel=1e-5)


def test_each_train_step_is_one_step(rank, model):
    trainer = titan_trainer(Trainer, model, accumulate=1)
    batches = iter(titan_batches())
    trainer.train_step(batches)
    expected, before = expected_of(model, token_batches()[1:]), weights(model)
    rate = trainer.optimizers.optimizers[0].param_groups[0]["lr"]  # 0.99 by torchtitan's schedule
    trainer.train_step(batches)
    assert trainer.fsam_step.steps == 2
    assert error({name: x / rate for name, x in moved(before, model).items()}, expected) < 1e-5


def test_autocast_of_torchtitan_is_used_by_the_model(rank, model):
    expected, before = expected_of(model, token_batches()), weights(model)
    trainer = titan_trainer(Trainer, model)
    trainer.maybe_enable_amp = torch.autocast("cpu", torch.bfloat16)
    trainer.train_step(iter(titan_batches()))
    assert 1e-4 < error(moved(before, model), expected) < 0.05


def test_step_that_is_not_finite_changes_nothing(rank, model):
    with torch.no_grad():
        model.output.weight[0] = float("inf")
    before = weights(model)
    trainer = titan_trainer(Trainer, model)
    trainer.train_step(iter(titan_batches()))
    assert trainer.fsam_step.skipped_steps == 1
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


def test_state_is_saved_and_restored_with_the_trainers(rank, model):
    class Reusing(Trainer):
        schedule = Schedule(every=2, between="reuse")

    trainer = titan_trainer(Reusing, model)
    trainer.train_step(iter(titan_batches()))
    state = trainer.state_dict()
    other = titan_trainer(Reusing, titan_model())
    other.load_state_dict(state)
    assert other.step == trainer.step
    assert other.fsam_step.steps == 1
    kept = other.fsam_step.state_dict()["correction"]
    assert all(torch.equal(x, kept[i]) for i, x in state["fsam"]["correction"].items())
    assert any(x.any() for x in kept.values())


def test_pipeline_and_several_ranks_are_refused(model):
    from torchtitan.distributed import ParallelDims

    degrees = dict.fromkeys(["dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"], 1)
    trainer = titan_trainer(Trainer, model)
    for axis, sentence in (("pp", "pipeline parallelism"), ("dp_shard", "got 2 ranks"), ("tp", "got 2 ranks")):
        trainer.parallel_dims = ParallelDims(**{**degrees, axis: 2}, world_size=2)
        with pytest.raises(UserError, match=sentence):
            _ = trainer.fsam_step
