"""Methods are frozen data, checked where they are made."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import spawn

from fsam_core import (
    NAMES,
    SAM,
    Ascent,
    FunctionalSAM,
    LogitSAM,
    Perturbed,
    Plain,
    Schedule,
    UserError,
    describe,
    named,
)

KINDS = (SAM, FunctionalSAM, LogitSAM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rho", -0.1),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("rho", True),
        ("rho", None),
        ("rho", "big"),
        ("rho", "0.5"),
        ("rho", [0.5]),
        ("rho", 1j),
        ("precondition", "sgd"),
        ("precondition", True),
        ("norm", "l1"),
        ("norm", None),
        ("second_moment", "next"),
        ("second_moment", None),
        ("ascent", None),
        ("ascent", ["full"]),
        ("combine", "gsam"),
        ("reuse", 3),
        ("seed", "a"),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_bad_value_is_refused_with_its_name(kind, argument, value):
    with pytest.raises(UserError) as caught:
        kind(**{"rho": 0.5, argument: value})
    assert str(caught.value).startswith(argument)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scope": "top"}, r"scope: 'top' is not known; use all, no-head, norms, top:K"),
        ({"scope": "top:0"}, "scope: 'top:0' is not known"),
        ({"ascent": "up"}, "ascent: 'up' is not known; use one of full, part, micro, rest, previous"),
        ({"ascent_fraction": 0.5}, "goes with ascent='part' and fraction=1"),
        ({"ascent": "part", "fraction": 0.5, "ascent_fraction": 0.25}, "goes with ascent='part' and fraction=1"),
        ({"ascent": "part", "ascent_fraction": 0}, r"ascent_fraction must be a number in \(0, 1\]"),
        ({"ascent": "micro", "fraction": 0.5}, "'micro' corrects every micro-batch"),
        ({"form": "halves"}, "form: 'halves' is not known; use one of correction, split"),
        ({"form": "split", "ascent": "rest"}, "form: 'split' needs a fraction below 1"),
        ({"form": "split", "ascent": "rest", "fraction": 0.5, "strength": 0.5}, "which is its strength too"),
        ({"form": "split", "fraction": 0.5}, "use ascent='rest', got 'full'"),
        ({"ascent": "rest", "fraction": 0.5}, "ascent: 'rest' goes with form='split'"),
        ({"norm": "max"}, "norm: 'max' is not known"),
        ({"fraction": 0}, "^fraction must be"),
        ({"fraction": 1.5}, "^fraction must be"),
        ({"fraction": "1/8"}, "^fraction must be"),
        ({"strength": -1.0}, "^strength must be"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        FunctionalSAM(0.1, **options)


def test_an_ascent_of_ones_own_is_checked():
    with pytest.raises(UserError, match="source: 'whole' is not known; use one of full, part, micro, rest, none"):
        Ascent("mine", lambda seen: seen.gradient, "whole")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="of must be a function of an ascent's inputs, got 'gradient'"):
        Ascent("mine", "gradient")  # type: ignore[arg-type]


def test_split_step_takes_two_methods_and_a_longer_perturbation():
    split = {"form": "split", "ascent": "rest", "fraction": 0.25}
    assert SAM(0.1, **split).rho_at(0) == FunctionalSAM(lambda step: 0.1, **split).rho_at(3) == 0.4
    with pytest.raises(UserError, match="form: 'split' takes SAM or FunctionalSAM"):
        LogitSAM(0.1, **split)


@pytest.mark.parametrize("kind", [SAM, LogitSAM])
def test_hidden_cut_needs_the_functional_method(kind):
    with pytest.raises(UserError, match="cut: 'hidden' needs the functional method"):
        kind(0.1, cut="hidden")


def test_rho_schedule_is_checked_at_step_zero():
    assert SAM(lambda step: 0.5 + step).rho_at(2) == 2.5
    with pytest.raises(UserError, match=r"rho\(0\).*-1"):
        SAM(lambda step: step - 1)


@pytest.mark.parametrize("method", [Plain(), *(kind(0.5) for kind in KINDS)])
def test_methods_are_frozen_hashable_values(method):
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rho = 0.1
    assert method == dataclasses.replace(method)
    assert hash(method) == hash(dataclasses.replace(method))


@pytest.mark.parametrize("method", [Plain(), *(kind(0.5, "weights", ascent="quantised:4") for kind in KINDS)])
def test_methods_are_pickled_by_their_fields(method):
    read = pickle.loads(pickle.dumps(method))
    assert read == method
    if isinstance(read, Perturbed):
        assert (read.exact, read.direction.name) == (True, "quantised:4")


def test_shared_base_is_no_method():
    with pytest.raises(UserError, match="use SAM"):
        Perturbed(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_its_method(name):
    kinds = {"adamw": "base", "sam": "sam", "precond-sam": "sam", "logit-sam": "logit"}
    method = named(name, 0.25, norm="dual", second_moment="previous")
    assert method.path == kinds.get(name, "functional")
    if name != "adamw":
        assert (method.rho, method.norm, method.second_moment) == (0.25, "dual", "previous")
        assert method.precondition == ("adam" if name.startswith("precond") else None)


def test_names_are_those_of_the_command():
    assert NAMES == ("adamw", "sam", "precond-sam", "functional-sam", "precond-functional-sam", "logit-sam")


@pytest.mark.parametrize("options", [{"rho": -1}, {"norm": "l1"}, {"second_moment": "next"}])
@pytest.mark.parametrize("name", NAMES)
def test_bad_option_is_refused_for_every_name(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        named(name, **options)


def test_unknown_name_is_refused_with_its_argument():
    with pytest.raises(UserError, match=r"--method: 'adam' is not known; use one of adamw, sam"):
        named("adam", argument="--method")


def test_numpy_scalars_become_python_numbers():
    method = SAM(np.float32(0.5), fraction=np.float16(0.125), strength=np.int64(2), seed=np.uint32(3))
    schedule = Schedule(every=np.int64(2), start=np.int32(10), probability=np.float32(0.5))
    assert json.loads(json.dumps(describe(method))) == describe(SAM(0.5, fraction=1 / 8, strength=2, seed=3))
    assert repr(schedule) == repr(Schedule(every=2, start=10, probability=0.5))


def test_describe_gives_plain_values():
    assert describe(Plain()) == {"path": "base"}
    got = describe(FunctionalSAM(0.5, precondition="adam"))
    named = {"path": "functional", "rho": 0.5, "precondition": "adam", "norm": "l2", "second_moment": "current"}
    named |= {
        "fraction": 1.0,
        "strength": 1.0,
        "form": "correction",
        "ascent": "full",
        "ascent_fraction": None,
        "scope": "all",
    }
    assert got == {
        **named,
        "cut": "logits",
        "seed": 0,
        "combine": None,
        "eta": 0.01,
        "norm_from": "current",
        "reuse": None,
    }
    assert isinstance(describe(SAM(lambda step: 0.1))["rho"], str)
    mine = describe(SAM(0.1, ascent=Ascent("mine", lambda seen: seen.momentum), scope=lambda name: True))
    assert mine["ascent"] == "mine"
    assert isinstance(mine["scope"], str)


@pytest.mark.parametrize("module", ["fsam_core", "fsam_core.methods", "fsam_core.backends", "fsam_kernels.spec"])
def test_import_needs_neither_framework(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'jax', 'optax', 'triton')))"
    spawn.run("-c", code)


@pytest.mark.parametrize(("module", "absent"), [("fsam_core.jax", "torch"), ("fsam_core.torch", "jax")])
def test_one_framework_does_not_import_the_other(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    spawn.run("-c", code)
