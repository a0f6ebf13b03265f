"""The decoder's sizes and its parameters: names, shapes and initial values, shared by Flax and PyTorch.

Pre-LN, GELU, learned positions, tied or untied head, no biases: the architecture of Nanodo, the trainer used in the
paper. With biases and an epsilon of 1e-5 it is GPT-2's; with `rms_norm`, `rotary` and `swiglu` it is Llama's. A flat
name such as "block_0.qkv" is the PyTorch parameter's own name and the path in the Flax tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fsam_core.errors import UserError
from fsam_core.scopes import Blocks

EMBEDDING_STD = 0.02  # logits of a fresh model have a standard deviation of 0.02 sqrt(D): the loss starts at ln V
# Every parameter that a block may have besides biases, in the order of both frameworks.
IN_BLOCK = (
    "attention_norm",
    *("qkv", "q", "kv", "q_norm", "k_norm", "attention_out"),
    *("mlp_norm", "mlp_gate", "mlp_in", "mlp_out"),
)


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
    """attention heads, which divide the width unless --head-width is given"""
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
    """epsilon of the norms"""
    rms_norm: bool = False
    """x / rms(x) in the place of layer norms, without biases, as Llama has them"""
    rotary: bool = False
    """queries and keys rotated by their positions in the place of learned positions"""
    rope_theta: float = 10000.0
    """with --rotary, the base of the wavelengths"""
    swiglu: bool = False
    """silu(x W_gate) * (x W_in) in the place of GELU"""
    mlp_width: int | None = None
    """hidden units of the MLP (default: 4 x width; with --swiglu 8/3, rounded up to a multiple of 8)"""
    kv_heads: int | None = None
    """heads of keys and values, which divide the heads (default: as many)"""
    head_width: int | None = None
    """features of a head (default: width / heads)"""
    qkv_biases: bool = False
    """biases of queries, keys and values alone, as Qwen2 has them"""
    qk_norm: bool = False
    """RMS norms of each head's query and key, as Qwen3 has them"""
    FAMILY: ClassVar[str] = "decoder"  # flax_FAMILY.py and torch_FAMILY.py have the model; `vit_layout` has another
    CAUSAL: ClassVar[bool] = True  # whether a position attends to none after it
    POSITION_STD: ClassVar[float] = EMBEDDING_STD

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "seq_len", "vocab_size", "mlp_width", "kv_heads", "head_width"):
            if (got := getattr(self, name)) is not None and got < 1:
                raise UserError(f"model: {name} must be at least 1, got {got}")
        if self.head_width is None and self.width % self.heads:
            raise UserError(f"model: width {self.width} must be a multiple of heads {self.heads}")
        if self.heads % self.K:
            raise UserError(f"--kv-heads must divide --heads {self.heads}, got {self.K}")
        if self.rotary and self.d % 2:
            raise UserError(f"--rotary takes heads of an even number of features, and these have {self.d}")
        if not 1 < self.rope_theta < math.inf:
            raise UserError(f"--rope-theta must be a finite number > 1, got {self.rope_theta}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"--norm-eps must be in (0, 1), got {self.norm_eps}")

    @property
    def d(self) -> int:
        """Features of a head."""
        return self.head_width or self.width // self.heads

    @property
    def K(self) -> int:
        """Heads of keys and values; each serves heads / K heads of queries."""
        return self.kv_heads or self.heads

    @property
    def F(self) -> int:
        """Hidden units of the MLP."""
        return self.mlp_width or (8 * math.ceil(self.width / 3) if self.swiglu else 4 * self.width)

    @property
    def rows(self) -> int:
        """Rows of the head a sequence: one a token."""
        return self.seq_len

    @property
    def top(self) -> tuple[int, ...]:
        """The k of the top-k accuracies that an evaluation reports: none of tokens."""
        return ()

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters in front of the blocks, flat name -> shape."""
        positions = {} if self.rotary else {"positions": (self.seq_len, self.width)}
        return {"embedding": (self.vocab_size, self.width), **positions}

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of the head, without those that it shares with the embedding."""
        return {} if self.tied else {"head": (self.vocab_size, self.width)}

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
    c, D, A = config, config.width, config.heads * config.d
    # One product for queries, keys and values; heads of keys that several heads of queries share have their own.
    attention = {"qkv": (D, 3 * A)} if c.heads == c.K else {"q": (D, A), "kv": (D, 2 * c.K * c.d)}
    block: dict[str, tuple[int, ...]] = {
        "attention_norm": (D,),
        **attention,
        **({"q_norm": (c.d,), "k_norm": (c.d,)} if c.qk_norm else {}),
        "attention_out": (A, D),
        "mlp_norm": (D,),
        **({"mlp_gate": (D, c.F)} if c.swiglu else {}),
        "mlp_in": (D, c.F),
        "mlp_out": (c.F, D),
    }
    found = {f"block_{i}.{name}": shape for i in range(c.layers) for name, shape in block.items()}
    found["final_norm"] = (D,)
    found |= {f"{name}_bias": shape[-1:] for name, shape in found.items() if has_bias(c, name.rpartition(".")[2])}
    return {**c.input_shapes, **found, **c.head_shapes}


def is_rms(config: ModelConfig, name: str) -> bool:
    """Whether the norm of this name is an RMS norm."""
    return config.rms_norm or name.endswith(("q_norm", "k_norm"))


def has_bias(config: ModelConfig, name: str) -> bool:
    """Whether a parameter of this name, without its block, has a bias."""
    if name.endswith("norm"):
        return config.biases and not is_rms(config, name)
    return config.biases or (config.qkv_biases and name in ("qkv", "q", "kv"))


def initial(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Flat name -> float32 initial value; the same in both frameworks for the same seed.

    Norm scales are 1, biases 0, embeddings N(0, 0.02²), matrices N(0, 1/fan-in), those that write into the residual
    stream smaller by sqrt(2 · layers).
    """
    random = np.random.Generator(np.random.Philox(seed))

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("_bias") else 1, np.float32)
        of_embeddings = {"embedding": EMBEDDING_STD, "positions": config.POSITION_STD, "head": EMBEDDING_STD}
        std = of_embeddings.get(name) or shape[0] ** -0.5
        if name.endswith("_out"):
            std /= math.sqrt(2 * config.layers)
        return random.standard_normal(shape, np.float32) * np.float32(std)

    return {name: value(name, shape) for name, shape in shapes(config).items()}


@lru_cache(maxsize=8)
def rotation(d: int, theta: float, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(cos, sin) of m θ^(−2i/d) for position m and pair i, [length, d / 2] each (Su et al., arXiv 2104.09864).

    The angles are products of float32 numbers, as in transformers: the models that are read were trained with these.
    """
    wavelengths_d = np.float32(theta) ** (np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    angles_Lxd = np.arange(length, dtype=np.float32)[:, None] * (np.float32(1) / wavelengths_d)
    return np.cos(angles_Lxd), np.sin(angles_Lxd)


def blocks(config: ModelConfig) -> Blocks:
    """Which parameters belong to which block, for scopes that are given by name."""
    head, above = ("embedding", "final_norm") if config.tied else ("head", "final_norm|head")
    return Blocks(config.layers, r"^block_(\d+)\.", rf"^({above})(_bias)?$", rf"^{head}(_bias)?$", r"norm(_bias)?$")
