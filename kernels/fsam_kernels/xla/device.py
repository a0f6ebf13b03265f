"""The device that a program is traced for, which need not be one of this process."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """A platform ("cpu", "gpu", "tpu", …) and JAX's name for the kind of device ("cpu", "TPU v5 lite", …)."""

    platform: str
    kind: str


def traced_for() -> Device:
    """That of the mesh in use, where it says so, as it does ahead of time; else the process's own."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform is not None:
        return Device(abstract.platform, abstract.device_kind)
    return Device(jax.default_backend(), jax.devices()[0].device_kind)
