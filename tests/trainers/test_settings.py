"""The schedule and the budgets."""

import dataclasses
import math

import numpy as np
import pytest

from fsam_core import UserError
from fsam_trainers.config import Settings, difference, steps_for
from fsam_trainers.jax.engine import learning_rate
from fsam_trainers.models.layout import ModelConfig

MODEL = ModelConfig(layers=1, width=8, heads=2, seq_len=4, vocab_size=16)


WSD = {"learning_rate_schedule": "wsd"}
SCHEDULES = ({}, WSD, {**WSD, "decay_shape": "1-sqrt", "decay": 0.5}, {**WSD, "decay": 0}, {**WSD, "decay": 1})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (1, 0), (10, 10), (7, 3)])
def test_the_schedule_is_the_same_in_both_frameworks(steps, warmup, schedule):
    settings = Settings("jax", "adamw", MODEL, steps=steps, batch=1, learning_rate=0.3, warmup=warmup, **schedule)
    ours = [settings.learning_rate_at(i) for i in range(steps)]
    theirs = [float(learning_rate(settings)(i)) for i in range(steps)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_the_schedule_warms_up_peaks_and_ends_at_its_floor():
    settings = Settings("jax", "adamw", MODEL, steps=1000, batch=1, learning_rate=2.0, warmup=100)
    assert settings.learning_rate_at(0) == 0
    assert settings.learning_rate_at(100) == 2.0
    assert settings.learning_rate_at(550) == pytest.approx(2.0 * 0.55)
    assert settings.learning_rate_at(1000) == pytest.approx(0.2)


def test_wsd_is_constant_until_its_decay():
    settings = Settings("jax", "adamw", MODEL, steps=1000, batch=1, learning_rate=2.0, warmup=100, **WSD)
    assert {settings.learning_rate_at(i) for i in range(100, 801)} == {2.0}
    assert settings.learning_rate_at(900) == pytest.approx(2.0 * 0.55)
    assert settings.learning_rate_at(1000) == pytest.approx(0.2)
    root = dataclasses.replace(settings, decay_shape="1-sqrt")
    assert root.learning_rate_at(850) == pytest.approx(2.0 * (1 - 0.9 * 0.5))


@pytest.mark.parametrize(("option", "value"), [("schedule", "wds"), ("decay", 1.5), ("decay_shape", "sqrt")])
def test_wrong_schedule_is_named(option, value):
    name = {"schedule": "learning_rate_schedule"}.get(option, option)
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be .*{value}"):
        Settings("jax", "adamw", MODEL, steps=10, batch=1, **{name: value})


def test_steps_for_a_chinchilla_budget_cover_the_tokens():
    steps = steps_for(20, MODEL, batch=3)
    tokens = 20 * MODEL.non_embedding_parameters
    assert (steps - 1) * 12 < tokens <= steps * 12


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf])
def test_a_budget_must_be_a_positive_number(ratio):
    with pytest.raises(UserError, match="--tokens-per-param"):
        steps_for(ratio, MODEL, batch=3)


def test_difference_names_what_changed():
    a = Settings("jax", "adamw", MODEL, steps=10, batch=1).as_dict()
    b = Settings("jax", "sam", MODEL, steps=10, batch=1).as_dict()
    assert difference(a, a) == ""
    assert difference(b, a) == "method 'adamw' (now 'sam')"
    del a["decay"], a["model"]["dropout"]  # a checkpoint from before there were these
    assert difference(b, a) == "method 'adamw' (now 'sam')"
