"""Which backend runs: argument, then FSAM_BACKEND, then auto; one that is named is used or refused."""

from __future__ import annotations

import importlib.util

import pytest
from problems import Weights, adamw, mlp, values

from fsam_core import UserError, backends
from fsam_core.jax import value_and_grad
from fsam_core.methods import Plain
from fsam_core.torch import Step

PLAIN = {"jax": "xla", "torch": "torch"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FSAM_BACKEND", raising=False)


@pytest.mark.parametrize("framework", PLAIN)
@pytest.mark.parametrize("backend", [None, "auto", ""])
def test_auto_states_its_choice_and_reason(framework, backend):
    choice = backends.choose(framework, backend)
    assert choice.name in backends.BACKENDS[framework]
    assert choice.reason.startswith("auto: ")


@pytest.mark.parametrize("framework", PLAIN)
def test_named_backend_is_used(framework, monkeypatch):
    assert backends.choose(framework, PLAIN[framework]) == backends.Choice(PLAIN[framework], "asked for")
    monkeypatch.setenv("FSAM_BACKEND", PLAIN[framework])
    assert backends.choose(framework) == backends.Choice(PLAIN[framework], "FSAM_BACKEND")


@pytest.mark.parametrize(
    ("framework", "name"), [("jax", "cuda"), ("torch", "cuda"), ("jax", "torch"), ("torch", "xla")]
)
@pytest.mark.parametrize("source", ["asked for", "FSAM_BACKEND"])
def test_unknown_or_foreign_backend_is_refused(framework, name, source, monkeypatch):
    monkeypatch.setenv("FSAM_BACKEND", name)
    with pytest.raises(UserError, match=rf"backend: '{name}' \({source}\).*{PLAIN[framework]}"):
        backends.choose(framework, name if source == "asked for" else None)


@pytest.mark.parametrize(("framework", "name"), [("jax", "pallas"), ("torch", "triton")])
def test_missing_backend_is_refused_and_auto_avoids_it(framework, name, monkeypatch):
    monkeypatch.setattr(backends, "built", lambda backend: backend == PLAIN[framework])
    with pytest.raises(UserError, match=f"'{name}'.*not part of this version, which has {PLAIN[framework]}"):
        backends.choose(framework, name)
    assert backends.choose(framework).name == PLAIN[framework]


def test_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("FSAM_BACKEND", "nonsense")
    assert backends.choose("jax", "xla").name == "xla"
    assert backends.choose("torch", "auto").name in backends.BACKENDS["torch"]


def test_bad_backend_is_refused_where_the_step_is_made(monkeypatch):
    monkeypatch.setenv("FSAM_BACKEND", "nonsense")
    model = Weights(values())
    with pytest.raises(UserError, match="nonsense"):
        Step(model, adamw(model), Plain(), features=mlp)
    with pytest.raises(UserError, match="nonsense"):
        value_and_grad(mlp, Plain())
    assert value_and_grad(mlp, Plain(), backend="xla")


@pytest.mark.parametrize(
    ("module", "extra"), [("jax", "jax"), ("torch", "torch"), ("triton", "triton"), ("optax", "jax")]
)
def test_missing_package_is_named_with_its_pip_command(module, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{module} is not installed: pip install 'fsam\[{extra}\]'"):
        backends.require(module)


def test_triton_on_a_cpu_is_refused_outside_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    model = Weights(values())
    with pytest.raises(UserError, match=r"backend: 'triton' runs on a GPU .* use backend='torch'"):
        Step(model, adamw(model), Plain(), features=mlp, backend="triton")


@pytest.mark.parametrize("framework", PLAIN)
def test_loaded_backend_has_the_operations(framework):
    ops = backends.load(framework)
    for name in ("linear_cross_entropy", "logit_vjp", "preconditioned_norm", "perturb", "Adam"):
        assert callable(getattr(ops, name))
