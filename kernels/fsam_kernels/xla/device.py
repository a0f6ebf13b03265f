"""The platform that a program is traced for, which need not be that of this process."""

from __future__ import annotations

import jax


def traced_for() -> str:
    """Of the mesh in use where it says so, as it does ahead of time; else the process's own: "cpu", "gpu", "tpu", …"""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if abstract is None or abstract.platform is None else abstract.platform
