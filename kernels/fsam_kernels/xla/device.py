"""The platform that a program is compiled for, which need not be that of this process."""

from __future__ import annotations

import jax


def traced_for() -> str:
    """The platform ("cpu", "gpu", "tpu", …) of the current mesh, if it names one; else that of this process."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if abstract is None or abstract.platform is None else abstract.platform
