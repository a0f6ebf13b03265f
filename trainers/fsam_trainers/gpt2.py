"""The decoder's weights under GPT-2's names in `transformers`, and its sizes as their config.json.

GPT-2 stores its projections as [in, out], queries, keys and values side by side, as this decoder does: arrays are
renamed and never reshaped. Its GELU is the tanh form, as here (`gelu_new`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.models.layout import ModelConfig, shapes

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function
_BLOCK = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_TOP = {"embedding": "wte", "positions": "wpe", "final_norm": "ln_f"}


def config_to_hf(config: ModelConfig, end: int | None) -> dict[str, Any]:
    """The config.json of `GPT2LMHeadModel`; `end` is the id that ends a document."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": None,
        "n_positions": config.seq_len,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def weights_to_hf(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat name -> value, as `GPT2LMHeadModel` names them; a model without biases gets zeros."""
    named = {}
    for name, shape in shapes(dataclasses.replace(config, biases=True)).items():
        named[_name(name)] = weights[name] if name in weights else np.zeros(shape, np.float32)
    return named


def config_from_hf(found: dict[str, Any], where: str) -> ModelConfig:
    """The sizes in a config.json of model_type gpt2. Tied, with biases, without dropout.

    Raises:
        UserError: starting with `where`, when the decoder cannot represent the model.
    """
    D = found.get("n_embd", 768)
    # Option -> the values that the decoder computes; a missing key has the first one in transformers.
    possible: dict[str, tuple[Any, ...]] = {
        "activation_function": _ACTIVATIONS,
        "n_inner": (None, 4 * D),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, values in possible.items():
        if (got := found.get(key, values[0])) not in values:
            raise UserError(f"{where}: its config.json has {key} {got!r}, and this decoder computes {values[0]!r} only")
    return ModelConfig(
        layers=found.get("n_layer", 12),
        width=D,
        heads=found.get("n_head", 12),
        seq_len=found.get("n_positions", 1024),
        vocab_size=found.get("vocab_size", 50257),
        tied=found.get("tie_word_embeddings", True),
        biases=True,
        norm_eps=found.get("layer_norm_epsilon", 1e-5),
    )


def weights_from_hf(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat name -> value, of those of the decoder's names that are there; GPT-2's files omit or have "transformer."."""
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    names = {name: _name(name).removeprefix("transformer.") for name in shapes(config)}
    return {ours: bare[theirs] for ours, theirs in names.items() if theirs in bare}


def _name(flat: str) -> str:
    """block_0.qkv_bias -> transformer.h.0.attn.c_attn.bias"""
    name, kind = (flat.removesuffix("_bias"), "bias") if flat.endswith("_bias") else (flat, "weight")
    if name == "head":
        return "lm_head.weight"
    block, _, part = name.rpartition(".")
    theirs = f"h.{block.removeprefix('block_')}.{_BLOCK[part]}" if block else _TOP[part]
    return f"transformer.{theirs}.{kind}"
