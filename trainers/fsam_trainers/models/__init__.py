"""The models, each in Flax and in PyTorch: `layout` and `vit_layout` name their parameters.

A model's module has `Model`, `features` and `staged`.
"""

import importlib
from typing import Any, Literal

from fsam_trainers.models.layout import ModelConfig


def module_of(framework: Literal["flax", "torch"], config: ModelConfig) -> Any:
    """The module of the model that has these sizes."""
    return importlib.import_module(f"fsam_trainers.models.{framework}_{config.FAMILY}")
