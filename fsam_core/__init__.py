"""Functional sharpness-aware training: methods as data. The training step is in `fsam_core.jax` and `fsam_core.torch`.

Importing this package imports neither jax nor torch.
"""

from fsam_core.ascents import Ascent
from fsam_core.errors import UserError
from fsam_core.methods import NAMES, SAM, FunctionalSAM, LogitSAM, Method, Perturbed, Plain, describe, named
from fsam_core.schedules import Schedule
from fsam_core.scopes import Blocks
from fsam_core.split import MicroBatches

__all__ = [
    "NAMES",
    "SAM",
    "Ascent",
    "Blocks",
    "FunctionalSAM",
    "LogitSAM",
    "Method",
    "MicroBatches",
    "Perturbed",
    "Plain",
    "Schedule",
    "UserError",
    "describe",
    "named",
]
