"""The axes of a run's devices, in both frameworks, and the sizes they must divide.

data     each device has its own sequences and the whole model (replicas)
fsdp     its own sequences, and a share of every matrix and its moments; a matrix is gathered where it is used
tensor   the same sequences, and a share of the attention heads, of the MLP's hidden units and of the vocabulary
"""

from __future__ import annotations

import math

from fsam_core.errors import UserError
from fsam_trainers.config import Settings

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that shard the sequences of a batch


def sizes(settings: Settings) -> dict[str, int]:
    """Devices along each axis."""
    return dict(zip(AXES, (settings.data_parallel, settings.fsdp, settings.tensor_parallel), strict=True))


def check_ranks(settings: Settings, count: int) -> None:
    """
    Raises:
        UserError: when so many ranks of one device each do not make that mesh; --data-parallel 1 is any number.
    """
    inner = settings.fsdp * settings.tensor_parallel
    if count % inner or settings.data_parallel not in (1, count // inner):
        asked = f"--data-parallel {settings.data_parallel}, --fsdp {settings.fsdp}"
        raise UserError(
            f"{asked} and --tensor-parallel {settings.tensor_parallel}: their product must be the {count} processes "
            "that run; torchrun starts more"
        )


def check_model(settings: Settings) -> None:
    """
    Raises:
        UserError: when the model cannot be divided so.
    """
    size, model = sizes(settings), settings.model
    for option, number, what, by in (
        ("--fsdp", model.width, "the model's width", ("tensor", "fsdp")),
        ("--tensor-parallel", model.heads, "the model's attention heads", ("tensor",)),
        ("--tensor-parallel", model.K, "the model's heads of keys and values", ("tensor",)),
        ("--tensor-parallel", model.F, "the hidden units of the model's MLP", ("tensor",)),
        ("--tensor-parallel", model.vocab_size, "the size of the vocabulary", ("tensor",)),
    ):
        check_divides(option, number, what, math.prod(size[axis] for axis in by), by)


def check_divides(option: str, number: int, what: str, parts: int, by: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: when `parts`, the devices along the axes `by`, do not divide the number.
    """
    if number % parts:
        over = " x ".join(by)
        raise UserError(f"{option}: {what}, {number}, must be a multiple of {parts}, the devices of {over}")
