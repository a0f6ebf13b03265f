"""The Vision Transformer's sizes and parameters, on the decoder's blocks without their causal mask.

Patches are embedded by one product with a bias; positions are learned; the head, untied and with a bias, has one row an
image: the mean of the last hidden states, or the first token's. That token's input is its position alone: a class
token and its position, both learned, would only ever be added to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from fsam_core.errors import UserError
from fsam_trainers.models.layout import ModelConfig

Pool = Literal["mean", "token"]
TOP = (1, 5)  # accuracies that are reported: the label is among so many likeliest classes


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Sizes of a Vision Transformer; `seq_len` counts patches and the class token, `vocab_size` classes.

    Raises:
        UserError: for sizes that do not fit together.
    """

    seq_len: tyro.conf.Suppress[int] = 0
    vocab_size: tyro.conf.Suppress[int] = 0
    tied: tyro.conf.Suppress[bool] = False
    biases: bool = True
    """biases of projections and norms"""
    patch: int = 4
    """pixels of a patch's side, which divide the image's"""
    pool: Annotated[Pool, tyro.conf.arg(metavar="STR")] = "mean"
    """what the head sees: the mean of the last hidden states, or a class token's"""
    height: tyro.conf.Suppress[int] = 8
    image_width: tyro.conf.Suppress[int] = 8
    channels: tyro.conf.Suppress[int] = 1
    classes: tyro.conf.Suppress[int] = 10
    FAMILY: ClassVar[str] = "vit"
    CAUSAL: ClassVar[bool] = False
    # About as large as embedded patches. At the decoder's 0.02 a mean over patches knows nothing of where they are, and
    # has to learn it first: on digits, 450 steps, 92 % accuracy instead of 96.
    POSITION_STD: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.patch < 1 or self.height % self.patch or self.image_width % self.patch:
            size = f"{self.height} x {self.image_width}"
            raise UserError(f"--patch must divide both sides of the images, {size} pixels, got {self.patch}")
        if self.pool not in get_args(Pool):
            raise UserError(f"--pool must be {' or '.join(get_args(Pool))}, got {self.pool!r}")
        if self.rotary:
            raise UserError("--rotary turns by positions on a line, and patches lie in a plane; leave it out")
        if self.classes < 2:
            raise UserError(f"--data: a classifier needs at least two classes, got {self.classes}")
        # Assigned here, so that they cannot disagree with the image's size.
        object.__setattr__(self, "seq_len", self.patches + (self.pool == "token"))
        object.__setattr__(self, "vocab_size", self.classes)
        object.__setattr__(self, "tied", False)
        super().__post_init__()

    @property
    def patches(self) -> int:
        return (self.height // self.patch) * (self.image_width // self.patch)

    @property
    def rows(self) -> int:
        """Rows of the head an image: one."""
        return 1

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        values, D = self.patch**2 * self.channels, self.width
        return {"patches": (values, D), "patches_bias": (D,), "positions": (self.seq_len, D)}

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"head": (self.classes, self.width), "head_bias": (self.classes,)}

    @property
    def top(self) -> tuple[int, ...]:
        """The k of the reported top-k accuracies; 5 for more than ten classes alone."""
        return TOP if self.classes > 10 else TOP[:1]


def kind_of(values: Mapping[str, Any]) -> type[ModelConfig]:
    """The class of a model's sizes, from the plain values that `dataclasses.asdict` made of them."""
    return ViTConfig if "patch" in values else ModelConfig


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """A model's sizes from these plain values."""
    return kind_of(values)(**values)
