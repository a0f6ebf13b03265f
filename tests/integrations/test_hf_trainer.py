"""The step in transformers' Trainer: accumulation, clipping, bf16, skipped steps, resumption, and what is refused."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from transformers import Trainer

from fsam_core import FunctionalSAM, Schedule
from fsam_core.ascents import ASCENTS
from fsam_core.errors import UserError
from fsam_core.torch import Step, from_model
from fsam_trainers.integrations.hf_trainer import FILE, FsamMixin, FsamTrainer
from integrations import causal_reference, hf_args, rows
from integrations_models import (
    CLIP,
    causal_loss,
    clipped,
    error,
    joined,
    llama,
    moved,
    reference,
    token_batches,
    weights,
)

METHOD = FunctionalSAM(rho=0.1)


def trainer(folder, model, data, method=METHOD, optimizer=None, trainer_options=None, **options):
    optimizers = (optimizer, None) if optimizer else (torch.optim.SGD(model.parameters(), lr=1.0), None)
    return FsamTrainer(
        model, hf_args(str(folder), **options), train_dataset=data, optimizers=optimizers, method=method,
        **(trainer_options or {}),
    )  # fmt: skip


def test_last_step_of_an_epoch_takes_the_micro_batches_that_are_left(tmp_path):
    model, batches = llama(), token_batches(3)
    made = trainer(tmp_path, model, rows(batches), max_steps=-1, num_train_epochs=1, learning_rate=0.0)
    sizes = []
    made.add_callback(_Seen(lambda: sizes.append(made.fsam_step.info.weight)))
    made.train()
    assert len(sizes) == made.fsam_step.steps == 2
    assert sum(sizes) == sum(float((b["labels"][:, 1:] >= 0).sum()) for b in batches)


def test_last_step_of_an_epoch_that_cannot_be_cut_is_refused_at_the_beginning(tmp_path):
    method = FunctionalSAM(rho=0.1, fraction=1 / 2)
    data = rows(token_batches(3))
    data = data[: len(data) - 1]  # an odd number
    of = lambda **options: trainer(tmp_path, llama(), data, method, gradient_accumulation_steps=1, **options)
    with pytest.raises(UserError, match=r"the last step of an epoch has \d of its \d+ rows; give dataloader_drop"):
        of(max_steps=-1, num_train_epochs=1).train()
    of(max_steps=-1, num_train_epochs=1, dataloader_drop_last=True).train()
    of(max_steps=1).train()  # never comes to the end of an epoch


def test_batch_size_that_is_yet_to_be_found_is_not_refused(tmp_path):
    """Batches of 9 would leave 1 of 10 rows, which cannot be cut; those of 2, which fit, leave none."""
    model, seen = llama(), []
    forward = model.forward

    def small(**batch):
        seen.append(len(batch["input_ids"]))
        if seen[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(**batch)

    model.forward = small
    options = {"auto_find_batch_size": True, "remove_unused_columns": False, "gradient_accumulation_steps": 1}
    sizes = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 9}
    method, data = FunctionalSAM(rho=0.1, fraction=1 / 2), rows(token_batches(5))
    made = trainer(tmp_path, model, data, method, **sizes, **options)
    made.train()
    assert made._train_batch_size == 2
    assert made.fsam_step.steps == 5


def test_training_step_that_the_mixin_would_hide_is_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    class Mine(FsamMixin, Own):
        pass

    class InFront(FsamTrainer):
        def training_step(self, *args, **kwargs):
            called.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    called, data = [], rows(token_batches())
    with pytest.raises(UserError, match=r"Own.training_step would never be called.* in front of FsamMixin"):
        Mine(llama(), hf_args(str(tmp_path)), train_dataset=data, method=METHOD).train()
    InFront(llama(), hf_args(str(tmp_path)), train_dataset=data, method=METHOD).train()
    assert called == [0, 0]


def test_context_of_the_trainers_loss_is_that_of_the_step(tmp_path):
    class Autocast(FsamTrainer):
        def compute_loss_context_manager(self):
            return torch.autocast("cpu", torch.bfloat16)

    model, dtypes = llama(), []
    model.lm_head.register_forward_pre_hook(lambda *_: dtypes.append(torch.is_autocast_enabled("cpu")))
    Autocast(model, hf_args(str(tmp_path)), train_dataset=rows(token_batches()), method=METHOD).train()
    assert dtypes
    assert all(dtypes)


def test_logged_loss_and_norm_are_the_steps(tmp_path):
    model, batches = llama(), token_batches()
    expected = float(causal_loss(model(joined(batches)["input_ids"]).logits, joined(batches)["labels"]).detach())
    made = trainer(tmp_path, model, rows(batches), logging_steps=1)
    made.train()
    logged = made.state.log_history[0]
    assert float(logged["loss"]) == pytest.approx(expected, rel=1e-3)
    assert float(logged["grad_norm"]) == pytest.approx(made.fsam_step.info.grad_norm, rel=1e-3)


def test_bf16_is_that_of_the_model_under_autocast(tmp_path):
    torch.manual_seed(0)
    model, batches = llama(), token_batches()
    plain, before = causal_reference(model, batches), weights(model)
    dtypes = []
    model.lm_head.register_forward_pre_hook(lambda *_: dtypes.append(torch.is_autocast_enabled("cpu")))
    made = trainer(tmp_path, model, rows(batches), bf16=True)
    made.train()
    assert all(dtypes)
    assert made.fsam_step.features(made.model, batches[0]).hidden.dtype == torch.bfloat16
    assert 1e-4 < error(moved(before, model), plain) < 0.05


def test_step_that_is_not_finite_changes_nothing(tmp_path):
    model, data = llama(), rows(token_batches())
    made = trainer(tmp_path, model, data, trainer_options={"check_first": False})
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    before = weights(model)
    made.train()
    assert made.fsam_step.skipped_steps == 1
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


@pytest.mark.parametrize(
    "method",
    [
        FunctionalSAM(rho=0.1, precondition="adam", fraction=1 / 2),
        pytest.param(FunctionalSAM(rho=0.1, ascent=ASCENTS["previous"]), marks=pytest.mark.slow),
    ],
    ids=["fraction", "previous"],
)
def test_resumed_run_ends_in_the_same_weights(tmp_path, method):
    data = rows(token_batches(8))

    def run(folder, resume=None, **options):
        torch.manual_seed(0)
        model = llama(attention_dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
        schedule = {"schedule": Schedule(every=3)} if method.fraction < 1 else {}
        made = trainer(folder, model, data, method, optimizer, schedule, **options)
        made.train(resume_from_checkpoint=resume)
        return weights(model), made.fsam_step.steps

    expected, steps = run(tmp_path)
    (tmp_path / "checkpoint-4").rename(tmp_path / "later")
    found, resumed = run(tmp_path, True)
    assert steps == resumed == 4
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_state_of_the_step_is_where_the_optimizers_is(tmp_path):
    """In the folder of a hyperparameter search's trial, and in the checkpoint that is pushed."""
    made, pushed = trainer(tmp_path, llama(), rows(token_batches()), save_strategy="steps", save_steps=1), []
    made._get_output_dir = lambda trial: str(tmp_path / "run-3")
    made.args.push_to_hub, made._push_from_checkpoint = True, lambda folder: pushed.extend(os.listdir(folder))
    made.train()
    assert torch.load(tmp_path / "run-3" / "checkpoint-1" / FILE)["steps"] == 1
    assert {FILE, "optimizer.pt"} <= set(pushed)
    made = trainer(tmp_path / "light", llama(), rows(token_batches()), save_strategy="steps", save_only_model=True)
    made.train()
    assert not list((tmp_path / "light").rglob(FILE))


@pytest.mark.slow
def test_checkpoint_of_a_plain_trainer_counts_its_steps(tmp_path):
    data, model = rows(token_batches(4)), llama()
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, model, data, **options).train()
    (tmp_path / "checkpoint-1" / FILE).unlink()
    made = trainer(tmp_path, model, data, **{**options, "max_steps": 2})
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert made.fsam_step.steps == 2


def test_first_micro_batch_without_labels_is_not_compared(tmp_path):
    data = rows(token_batches())
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    made = trainer(tmp_path, llama(), data)
    made.train()
    assert made.fsam_step.info.weight == 0
    assert made._to_check


def test_features_that_are_not_the_models_are_found_at_the_first_batch(tmp_path):
    from fsam_core.torch.from_model import from_model

    wrong = {"features": from_model("lm_head")}  # the labels are not shifted
    with pytest.raises(UserError, match="their loss"):
        trainer(tmp_path, llama(), rows(token_batches()), trainer_options=wrong).train()


@pytest.mark.slow
def test_frozen_head_under_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, batches = get_peft_model(llama(), LoraConfig(target_modules=["down_proj"])), token_batches()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # 0 at first, and with it the gradient of the other factor
            torch.nn.init.normal_(p, std=0.1)
    expected, before = causal_reference(model, batches), weights(model)
    trainer(tmp_path, model, rows(batches)).train()
    assert error(moved(before, model), expected) < 1e-5


@pytest.mark.slow
def test_router_loss_reaches_the_optimizer(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=97, num_key_value_heads=2, **sizes, **options))
    model.set_experts_implementation("eager")  # the others have no float64
    batches = token_batches(1)
    balance = __import__(type(model).__module__, fromlist=["x"]).load_balancing_loss_func

    def outputs(model):
        found = model(batches[0]["input_ids"])
        return (found.logits, *found.router_logits)

    loss = lambda z, *router: causal_loss(z, batches[0]["labels"]) + 0.1 * balance(router, 4, 2)
    expected, before = clipped(reference(model, outputs, loss), CLIP), weights(model)
    trainer(tmp_path, model, rows(batches), gradient_accumulation_steps=1).train()
    assert error(moved(before, model), expected) < 1e-5


def test_scaled_losses_and_unknown_losses_are_refused(tmp_path):
    made = trainer(tmp_path, llama(), rows(token_batches()))
    made.accelerator.scaler = object()
    with pytest.raises(UserError, match="fp16"):
        made._begin()
    made.accelerator.scaler, made.compute_loss_func = None, causal_loss
    with pytest.raises(UserError, match="compute_loss_func"):
        made._begin()


class _Seen:
    """A callback after every step."""

    def __new__(cls, function):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                function()

        return Callback()


def test_second_moment_of_the_perturbation_is_that_of_the_clipped_gradient(tmp_path):
    method, batches = FunctionalSAM(rho=0.1, precondition="adam"), token_batches(1)
    start, ends = llama(), {}
    for clip in (0.05, None):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = Step(model, optimizer, method, features=from_model("lm_head", shift=True), clip_norm=clip)
        for _ in range(3):
            step.gradient(batches[0])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        ends[clip] = weights(model)
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"max_steps": 3, "max_grad_norm": 0.05, "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant"}
    trainer(tmp_path, model, rows(batches), method, optimizer, learning_rate=1e-2, **options).train()
    off = lambda other: error(moved(weights(start), model), {k: weights(start)[k] - x for k, x in other.items()})
    assert off(ends[0.05]) < 1e-4 < off(ends[None])


def test_optimizers_that_have_a_training_mode_train_in_it(tmp_path):
    class Moded(torch.optim.SGD):
        mode = "eval"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

        def step(self, closure=None):
            seen.append(self.mode)
            return super().step(closure)

    seen, model, data = [], llama(), rows(token_batches())
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    optimizer, evaluated = Moded(model.parameters(), lr=0.1), {"eval_dataset": data}
    made = trainer(tmp_path, model, data, optimizer=optimizer, trainer_options=evaluated, **options)
    made.evaluate = lambda *args, **kwargs: made.optimizer.eval() or {}
    made.train()
    assert seen == ["train"] * 3
