"""The decoder's sizes and its parameters: names, shapes and initial values, shared by Flax and PyTorch.

Pre-LN, GELU, learned positions, tied or untied head, no biases: the architecture of Nanodo, the trainer used in the
paper. With biases and an epsilon of 1e-5 it is GPT-2's. A flat name such as "block_0.qkv" is the PyTorch parameter's
own name and the path in the Flax tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fsam_core.errors import UserError
from fsam_core.scopes import Blocks

EMBEDDING_STD = 0.02  # logits of a fresh model have a standard deviation of 0.02 sqrt(D): the loss starts at ln V


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder.

    Raises:
        UserError: for sizes that do not fit together.
    """

    layers: int
    """blocks"""
    width: int
    """features of the hidden state"""
    heads: int
    """attention heads, which divide the width"""
    seq_len: int
    """tokens a sequence"""
    vocab_size: int
    """size of the vocabulary"""
    tied: bool = True
    """one matrix for input embedding and head"""
    dropout: float = 0.0
    """after the embedding, attention and MLP"""
    biases: bool = False
    """biases of projections and layer norms, as GPT-2 has them"""
    norm_eps: float = 1e-6
    """epsilon of the layer norms"""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise UserError(f"model: width {self.width} must be a multiple of heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"--norm-eps must be in (0, 1), got {self.norm_eps}")

    @property
    def parameters(self) -> int:
        """All parameters, embeddings included."""
        return sum(math.prod(shape) for shape in shapes(self).values())

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without token embedding, positions and head: the count that names the presets."""
        embeddings = ("embedding", "positions", "head")
        return sum(math.prod(shape) for name, shape in shapes(self).items() if name not in embeddings)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Flat parameter name -> shape; matrices are [in, out], embedding and head [V, D], the bias of `x` is `x_bias`."""
    D, F = config.width, 4 * config.width
    found: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, D), "positions": (config.seq_len, D)}
    for i in range(config.layers):
        found[f"block_{i}.attention_norm"] = (D,)
        found[f"block_{i}.qkv"] = (D, 3 * D)
        found[f"block_{i}.attention_out"] = (D, D)
        found[f"block_{i}.mlp_norm"] = (D,)
        found[f"block_{i}.mlp_in"] = (D, F)
        found[f"block_{i}.mlp_out"] = (F, D)
    found["final_norm"] = (D,)
    if config.biases:
        found |= {f"{name}_bias": shape[-1:] for name, shape in found.items() if name not in ("embedding", "positions")}
    if not config.tied:
        found["head"] = (config.vocab_size, D)
    return found


def initial(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Flat name -> float32 initial value; the same in both frameworks for the same seed.

    Norm scales are 1, biases 0, embeddings N(0, 0.02²), matrices N(0, 1/fan-in), those that write into the residual
    stream smaller by sqrt(2 · layers).
    """
    random = np.random.Generator(np.random.Philox(seed))

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("_bias") else 1, np.float32)
        std = EMBEDDING_STD if name in ("embedding", "positions", "head") else shape[0] ** -0.5
        if name.endswith("_out"):
            std /= math.sqrt(2 * config.layers)
        return random.standard_normal(shape, np.float32) * np.float32(std)

    return {name: value(name, shape) for name, shape in shapes(config).items()}


def blocks(config: ModelConfig) -> Blocks:
    """Which parameters belong to which block, for scopes that are given by name."""
    head, above = ("embedding", "final_norm") if config.tied else ("head", "final_norm|head")
    return Blocks(config.layers, r"^block_(\d+)\.", rf"^({above})(_bias)?$", rf"^{head}$", r"norm(_bias)?$")


def nested(flat: dict[str, np.ndarray]) -> dict:
    """{"block_0.qkv": x} -> {"block_0": {"qkv": x}}: flat names as a Flax tree."""
    tree: dict = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def flattened(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `nested`."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
