"""JAX does not look for a TPU where libtpu is installed for its compiler alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys

import pytest

from fsam_trainers import platforms


class Entry:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with libtpu, without a TPU, before JAX is imported."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for name in platforms.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platforms, "TPU_FILES", (str(tmp_path / "accel*"),))
    monkeypatch.setattr(platforms, "PCI_VENDORS", str(tmp_path / "vendor*"))
    monkeypatch.setattr(platforms, "NVIDIA_FILES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return tmp_path


def chosen() -> str | None:
    platforms.skip_absent_tpu()
    return os.environ.pop("JAX_PLATFORMS", None)


def test_absent_tpu_is_not_looked_for(machine):
    assert chosen() == "cpu"


def test_gpu_stays_in_use(machine, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry("xla_cuda13")])
    assert chosen() == "cpu"  # the plugin without its card
    (machine / "nvidia0").touch()
    assert chosen() == "cuda,cpu"
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry("rocm")])
    assert chosen() is None


@pytest.mark.parametrize("how", ["file", "bus", "environment"])
def test_tpu_is_found(how, machine, monkeypatch):
    if how == "file":
        (machine / "accel0").touch()
    elif how == "bus":
        (machine / "vendor0").write_text("0x1ae0\n")
    else:
        monkeypatch.setenv("TPU_NAME", "mine")
    assert chosen() is None


def test_nothing_changes_without_libtpu_or_after_a_choice(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert chosen() == "tpu"
