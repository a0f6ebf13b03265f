"""Functional sharpness-aware training: the methods as data. The step is in `fsam_core.jax` and in `fsam_core.torch`.

Importing this package imports neither jax nor torch.
"""

from fsam_core.errors import UserError
from fsam_core.methods import NAMES, SAM, FunctionalSAM, LogitSAM, Method, Perturbed, Plain, describe, named

__all__ = [
    "NAMES",
    "SAM",
    "FunctionalSAM",
    "LogitSAM",
    "Method",
    "Perturbed",
    "Plain",
    "UserError",
    "describe",
    "named",
]
