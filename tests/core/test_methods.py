"""Methods are frozen data, checked where they are made."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from fsam_core import NAMES, SAM, Ascent, FunctionalSAM, LogitSAM, Perturbed, Plain, UserError, describe, named

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
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_itself(kind, argument, value):
    with pytest.raises(UserError) as caught:
        kind(**{"rho": 0.5, argument: value})
    assert str(caught.value).startswith(argument)
    assert repr(value) in str(caught.value)


def test_a_schedule_is_tried_at_step_zero():
    assert SAM(lambda step: 0.5 + step).rho_at(2) == 2.5
    with pytest.raises(UserError, match=r"rho\(0\).*-1"):
        SAM(lambda step: step - 1)


@pytest.mark.parametrize("method", [Plain(), *(kind(0.5) for kind in KINDS)])
def test_methods_are_frozen_hashable_values(method):
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rho = 0.1
    assert method == dataclasses.replace(method)
    assert hash(method) == hash(dataclasses.replace(method))


def test_the_shared_base_is_not_a_method():
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
def test_a_bad_option_is_refused_for_every_name(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        named(name, **options)


def test_an_unknown_name_is_refused_as_the_argument_it_came_from():
    with pytest.raises(UserError, match=r"--method: 'adam' is not known; use one of adamw, sam"):
        named("adam", argument="--method")


def test_describe_gives_plain_values():
    assert describe(Plain()) == {"path": "base"}
    got = describe(FunctionalSAM(0.5, precondition="adam"))
    named = {"path": "functional", "rho": 0.5, "precondition": "adam", "norm": "l2", "second_moment": "current"}
    named |= {"fraction": 1.0, "strength": 1.0, "ascent": "full", "ascent_fraction": None, "scope": "all"}
    assert got == {**named, "cut": "logits", "seed": 0}
    assert isinstance(describe(SAM(lambda step: 0.1))["rho"], str)
    mine = describe(SAM(0.1, ascent=Ascent("mine", lambda seen: seen.momentum), scope=lambda name: True))
    assert mine["ascent"] == "mine"
    assert isinstance(mine["scope"], str)


@pytest.mark.parametrize("module", ["fsam_core", "fsam_core.methods", "fsam_core.backends", "fsam_kernels.spec"])
def test_import_brings_in_neither_framework(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'jax', 'optax', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("module", "absent"), [("fsam_core.jax", "torch"), ("fsam_core.torch", "jax")])
def test_one_framework_does_not_import_the_other(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
