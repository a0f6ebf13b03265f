"""Model sizes and the training settings that go with them.

The paper names its models by non-embedding parameters (2M, 23.9M, 42.5M, 117.9M, 1208M) and does not give their widths:
the layers and widths here are this project's, chosen to meet those counts. Batch and sequence of the larger presets are
the paper's (256 × 512); learning rates are this project's starting points, not tuned ones.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def model(self, *, seq_len: int | None = None, vocab_size: int | None = None, tied: bool, dropout: float):
        return ModelConfig(
            self.layers, self.width, self.heads, seq_len or self.seq_len, vocab_size or self.vocab_size, tied, dropout
        )


PRESETS: dict[str, Preset] = {
    "tiny": Preset(4, 128, 4, 128, 4096, 16, 2e-3, 0.2),
    "2m": Preset(6, 168, 7, 512, 32768, 256, 2e-3, 0.5),
    "24m": Preset(6, 576, 9, 512, 32768, 256, 1e-3, 0.5),
    "43m": Preset(6, 768, 12, 512, 32768, 256, 1e-3, 0.5),
    "118m": Preset(6, 1280, 20, 512, 32768, 256, 6e-4, 0.4),
    "1208m": Preset(24, 2048, 32, 512, 32768, 256, 3e-4, 0.4),
}


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"--preset: {name!r} is not known; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
