"""Model sizes and the training settings that go with them.

The paper names its models by non-embedding parameters (2M, 23.9M, 42.5M, 117.9M, 1208M) and does not give their widths:
the layers and widths here are this project's, chosen to meet those counts. Batch and sequence of the larger presets are
the paper's (256 × 512); learning rates are this project's starting points, not tuned ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fsam_core.errors import UserError
from fsam_trainers.models.layout import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A model's sizes and its usual batch (sequences), peak learning rate and ρ (in the units of the weights)."""

    layers: int
    width: int
    heads: int
    seq_len: int
    vocab_size: int
    batch: int
    learning_rate: float
    rho: float

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the model, by their names in `ModelConfig`."""
        return {name: getattr(self, name) for name in ("layers", "width", "heads", "seq_len", "vocab_size")}

    def model(self, *, seq_len: int | None = None, vocab_size: int | None = None, tied: bool, dropout: float):
        seq_len = self.seq_len if seq_len is None else seq_len
        vocab_size = self.vocab_size if vocab_size is None else vocab_size
        return ModelConfig(self.layers, self.width, self.heads, seq_len, vocab_size, tied, dropout)


@dataclass(frozen=True)
class ViTPreset:
    """As `Preset`, of a Vision Transformer: `size` pixels a side; `patch` 0 is chosen by the size of the images."""

    layers: int
    width: int
    heads: int
    patch: int
    size: int
    channels: int
    classes: int
    batch: int
    learning_rate: float
    rho: float

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the model that images do not determine, by their names in `ViTConfig`."""
        return {name: getattr(self, name) for name in ("layers", "width", "heads", "patch")}

    def model(self, *, seq_len: int | None = None, vocab_size: int | None = None, tied: bool, dropout: float):
        """The model for images of the preset's size; `vocab_size` is the number of classes, and nothing is tied."""
        if seq_len is not None:
            raise UserError(f"--seq-len: a Vision Transformer's follows from image and patch, got {seq_len}")
        from fsam_trainers.models.vit_layout import ViTConfig  # needs tyro, which tools/device_check.py does without

        return ViTConfig(
            self.layers,
            self.width,
            self.heads,
            patch=self.patch or self.size // 7,
            height=self.size,
            image_width=self.size,
            channels=self.channels,
            classes=self.classes if vocab_size is None else vocab_size,
            dropout=dropout,
        )


PRESETS: dict[str, Preset] = {
    "tiny": Preset(4, 128, 4, 128, 4096, 16, 2e-3, 0.2),
    "2m": Preset(6, 168, 7, 512, 32768, 256, 2e-3, 0.5),
    "24m": Preset(6, 576, 9, 512, 32768, 256, 1e-3, 0.5),
    "43m": Preset(6, 768, 12, 512, 32768, 256, 1e-3, 0.5),
    "118m": Preset(6, 1280, 20, 512, 32768, 256, 6e-4, 0.4),
    "1208m": Preset(24, 2048, 32, 512, 32768, 256, 3e-4, 0.4),
}


VIT_PRESETS: dict[str, ViTPreset] = {
    "vit-tiny": ViTPreset(4, 64, 4, 0, 28, 1, 10, 64, 1e-3, 0.1),
    "vit-s16": ViTPreset(12, 384, 6, 16, 224, 3, 1000, 1024, 1e-3, 0.1),
    "vit-b16": ViTPreset(12, 768, 12, 16, 224, 3, 1000, 1024, 1e-3, 0.1),
}
DEFAULT_PRESETS = {"text": "tiny", "images": "vit-tiny"}


def preset(name: str, task: Literal["text", "images"] | None = None) -> Preset | ViTPreset:
    """The preset called `name`; None for that of either task.

    Raises:
        UserError: for an unknown name, or one of another task.
    """
    of: dict[str, Mapping[str, Preset | ViTPreset]] = {"text": PRESETS, "images": VIT_PRESETS}
    known: Mapping[str, Preset | ViTPreset] = of[task] if task else {**PRESETS, **VIT_PRESETS}
    if name in known:
        return known[name]
    other = next((one for one, presets in of.items() if name in presets), None)
    if other:
        raise UserError(f"--preset: {name} is a model of {other}; give --task {other}, or one of {', '.join(known)}")
    raise UserError(f"--preset: {name!r} is not known; use one of {', '.join(known)}")
