"""A package that is missing or broken is one sentence with the command that helps, never a traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import spawn

from fsam_core import UserError, backends

# A Python in which some packages do not exist.
MISSING = """
import importlib.machinery as machinery, os
missing, find = os.environ["MISSING"].split(","), machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *more: None if name.partition(".")[0] in missing else find(name, *more)
)
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]), **more}


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which jax and torch are there, and raise when they are imported."""
    for name, raised in (
        ("jax", "ImportError('no jaxlib\\n of this version')"),
        ("torch", "OSError('libcudart.so.12')"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {raised}")
    return environment(tmp_path)


def without(tmp_path: Path, *packages: str) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    return environment(tmp_path, MISSING=",".join(packages))


def test_a_broken_module_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as error:
        backends.require("json", "broken_package")
    assert str(error.value) == (
        "broken_package is installed but cannot be imported (ModuleNotFoundError: No module named "
        "'a_module_that_is_nowhere'): pip install --force-reinstall 'fsam[broken_package]'"
    )
    with pytest.raises(UserError, match="no_such_package is not installed: pip install"):
        backends.require("no_such_package.module")


def test_backends_shows_broken_packages(tmp_path, broken):
    done = spawn.run("-m", "fsam_trainers.cli", "backends", "--json", tmp_path / "b.json", env=broken)
    assert "cannot be imported" in done.stdout
    reasons = {row["framework"]: row["reason"] for row in json.loads((tmp_path / "b.json").read_text())}
    assert reasons["jax"].startswith("jax is installed but cannot be imported (ImportError: no jaxlib of this version)")
    assert reasons["torch"].startswith("torch is installed but cannot be imported (OSError: libcudart.so.12)")


def test_backends_prints_the_extra_that_is_missing(tmp_path):
    done = spawn.run("-m", "fsam_trainers.cli", "backends", env=without(tmp_path, "torch", "optax"))
    assert "pip install 'fsam[torch]'" in done.stdout
    assert "optax is not installed: pip install 'fsam[jax]'" in done.stdout


def test_a_framework_without_a_device_is_one_sentence(tmp_path):
    done = spawn.run("-m", "fsam_trainers.cli", "backends", env={"JAX_PLATFORMS": "cuda", "COLUMNS": "400"})
    assert "backend: JAX finds no device to run on (" in done.stdout


@pytest.mark.parametrize("package", ["optax", "flax", "orbax"])
def test_a_missing_package_is_found_before_the_text_is_tokenized(tmp_path, package):
    cache = tmp_path / "cache"
    environment = without(tmp_path, package) | {"FSAM_CACHE": str(cache)}
    done = spawn.run("-m", "fsam_trainers.cli", "train", "--framework", "jax", env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, f"fsam: error: {package} is not installed: pip install 'fsam[jax]'\n")
    assert not cache.exists()


LACKS = [
    ("torch", ["step"]),
    ("jax", ["trace"]),
    ("jax", ["tpu"]),
    ("torch", ["check", "--only", "gpu"]),
    ("jax", ["check", "--only", "tpu"]),
]


@pytest.mark.parametrize(("missing", "arguments"), LACKS)
def test_profile_says_what_a_subcommand_lacks(tmp_path, missing, arguments):
    environment = without(tmp_path, missing)
    done = spawn.run("-m", "fsam_trainers.cli", "profile", *arguments, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"fsam: error: {missing} is not installed: pip install 'fsam[{missing}]'\n"


@pytest.mark.slow
def test_profile_needs_only_what_a_subcommand_uses(tmp_path):
    sizes = ["--batch", "1", "--seq-len", "8", "--vocab-size", "300", "--repeats", "10"]
    command = ["profile", "step", "--framework", "jax", "--only", "adamw", "--no-peers", *sizes]
    done = spawn.run("-m", "fsam_trainers.cli", *command, env=without(tmp_path, "torch", "triton"))
    assert "adamw" in done.stdout
