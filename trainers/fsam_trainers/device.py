"""The device that a framework computes on, and the end of its work there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def platform(framework: str) -> str:
    """ "cpu", "cuda", "tpu", …"""
    if framework == "jax":
        import jax

        return jax.default_backend()
    return in_torch().type


def in_torch() -> torch.device:
    """PyTorch's: the accelerator where there is one, else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def waiting(frameworks: Iterable[str]) -> Callable[[], None]:
    """A function that returns when the device has done all that PyTorch launched.

    A JAX step waits for its own results, and nothing is launched on a CPU. In PyTorch a step that has read its loss may
    still have its update to do.
    """
    if "torch" not in set(frameworks) or platform("torch") == "cpu":
        return lambda: None
    import torch

    return torch.accelerator.synchronize
