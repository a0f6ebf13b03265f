"""The decoder's weights under the names of `transformers`, and its sizes as their config.json.

GPT-2 stores matrices as [in, out], queries, keys and values side by side, as this decoder does. Llama, Mistral, Qwen2
and Qwen3 store [out, in], and each of the three by itself. Values are transposed and put side by side, never computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fsam_core.errors import UserError
from fsam_trainers.models.layout import ModelConfig, shapes

Weights = dict[str, np.ndarray]
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function
_PLAIN_ROPE = (None, "default")


class _Names(NamedTuple):
    """Their names of our parameters. Those of several matrices side by side are several."""

    trunk: str
    block: str
    parts: dict[str, tuple[str, ...]]
    transposed: bool

    def of(self, flat: str) -> list[str]:
        """block_0.qkv_bias -> [transformer.h.0.attn.c_attn.bias]"""
        name, kind = (flat.removesuffix("_bias"), "bias") if flat.endswith("_bias") else (flat, "weight")
        if name == "head":
            return ["lm_head.weight"]
        block, _, part = name.rpartition(".")
        where = f"{self.block}.{block.removeprefix('block_')}." if block else ""
        return [f"{self.trunk}.{where}{theirs}.{kind}" for theirs in self.parts[part]]

    def turns(self, flat: str, value: np.ndarray) -> bool:
        return self.transposed and value.ndim == 2 and flat not in ("embedding", "head")


_Q, _K, _V = (f"self_attn.{x}_proj" for x in "qkv")
_GPT2 = _Names(
    "transformer",
    "h",
    {
        "embedding": ("wte",),
        "positions": ("wpe",),
        "attention_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "attention_out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": ("mlp.c_proj",),
        "final_norm": ("ln_f",),
    },
    transposed=False,
)
_LLAMA = _Names(
    "model",
    "layers",
    {
        "embedding": ("embed_tokens",),
        "attention_norm": ("input_layernorm",),
        "qkv": (_Q, _K, _V),
        "q": (_Q,),
        "kv": (_K, _V),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "attention_out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp_gate": ("mlp.gate_proj",),
        "mlp_in": ("mlp.up_proj",),
        "mlp_out": ("mlp.down_proj",),
        "final_norm": ("norm",),
    },
    transposed=True,
)


# --- to transformers --------------------------------------------------------------------------------------------------


def to_hf(config: ModelConfig, weights: Weights, end: int | None, where: str) -> tuple[dict[str, Any], Weights]:
    """(config.json, tensors by their names) of a model that transformers loads; `end` is the id that ends a document.

    GPT-2 has biases: a model without them gets zeros.

    Raises:
        UserError: starting with `where`, for a model of neither shape.
    """
    llama = config.rms_norm, config.rotary, config.swiglu
    if all(llama):
        return _llama_config(config, end, where), _renamed(_LLAMA, weights)
    if any(llama) or config.heads != config.K or config.qk_norm or config.heads * config.d != config.width:
        raise UserError(
            f"{where} is of neither GPT-2's shape nor Llama's (--rms-norm, --rotary and --swiglu together), so "
            "transformers has no name for it; give --to safetensors"
        )
    every = shapes(dataclasses.replace(config, biases=True)).items()
    filled = {name: weights[name] if name in weights else np.zeros(shape, np.float32) for name, shape in every}
    return _gpt2_config(config, end), _renamed(_GPT2, filled)


def _renamed(names: _Names, weights: Weights) -> Weights:
    found = {}
    for flat, value in weights.items():
        theirs = names.of(flat)
        for name, part in zip(theirs, np.split(value, len(theirs), axis=-1), strict=True):
            found[name] = part.T if names.turns(flat, value) else part
    return found


def _gpt2_config(config: ModelConfig, end: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
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


def _llama_config(config: ModelConfig, end: int | None, where: str) -> dict[str, Any]:
    kind, name = "llama", "LlamaForCausalLM"
    if config.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_biases:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif config.width % config.heads:  # which transformers' Llama refuses
        kind, name = "mistral", "MistralForCausalLM"
    if (config.biases and kind != "llama") or (config.qk_norm and config.qkv_biases):
        raise UserError(f"{where} has biases that no model of transformers of this shape has; give --to safetensors")
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": config.F,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.K,
        "head_dim": config.d,
        "max_position_embeddings": config.seq_len,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.biases,
        "mlp_bias": config.biases,
        "sliding_window": None,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


# --- from transformers ------------------------------------------------------------------------------------------------


def from_hf(described: dict[str, Any], where: str) -> tuple[ModelConfig, Callable[[Weights], Weights]]:
    """The sizes in a config.json, without dropout, and what renames the tensors beside it to the decoder's.

    Only those of the decoder's names that are there are renamed.

    Raises:
        UserError: starting with `where`, when the decoder cannot represent the model.
        KeyError, TypeError: for a config.json without a size.
    """
    kind = described["model_type"]
    if kind not in ("gpt2", *_DEFAULTS):
        raise UserError(
            f"{where} is of model_type {kind!r}; this decoder computes those of {', '.join(('gpt2', *_DEFAULTS))}"
        )
    config, names = (_from_gpt2(described, where), _GPT2) if kind == "gpt2" else (_from_llama(described, where), _LLAMA)
    return config, partial(_as_ours, names, config)


def _as_ours(names: _Names, config: ModelConfig, tensors: Weights) -> Weights:
    prefix = f"{names.trunk}."  # which files of the trunk alone omit
    bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
    found = {}
    for flat in shapes(config):
        theirs = [bare.get(name.removeprefix(prefix)) for name in names.of(flat)]
        parts = [x.T if names.turns(flat, x) else x for x in theirs if x is not None]
        if len(parts) == len(theirs):
            found[flat] = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return found


def _check(found: dict[str, Any], possible: dict[str, tuple[Any, ...]], where: str) -> None:
    """Check options -> the values that the decoder computes; a missing key has the first one in transformers.

    Raises:
        UserError: naming the first key with another value.
    """
    for key, values in possible.items():
        if (got := found.get(key, values[0])) not in values:
            raise UserError(f"{where}: its config.json has {key} {got!r}, and this decoder computes {values[0]!r} only")


def _from_gpt2(found: dict[str, Any], where: str) -> ModelConfig:
    possible: dict[str, tuple[Any, ...]] = {
        "activation_function": _GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    }
    _check(found, possible, where)
    width, mlp_width = found.get("n_embd", 768), found.get("n_inner")
    return ModelConfig(
        layers=found.get("n_layer", 12),
        width=width,
        heads=found.get("n_head", 12),
        seq_len=found.get("n_positions", 1024),
        vocab_size=found.get("vocab_size", 50257),
        tied=found.get("tie_word_embeddings", True),
        biases=True,
        norm_eps=found.get("layer_norm_epsilon", 1e-5),
        mlp_width=None if mlp_width == 4 * width else mlp_width,
    )


# What a missing key means in transformers, where it is not the same for all.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


def _from_llama(described: dict[str, Any], where: str) -> ModelConfig:
    kind = described["model_type"]
    found = {**_DEFAULTS[kind], **described}
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    # Llama's own bias of attention includes its output, and the decoder has both or neither.
    with_biases = kind == "llama" and bool(found.get("mlp_bias", False))
    possible: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (with_biases,),
        "quantization_config": (None,),
    }
    _check({"attention_bias": False, **found}, possible, where)
    key = "rope_parameters" if found.get("rope_parameters") else "rope_scaling"
    if rope.get("rope_type", rope.get("type")) not in _PLAIN_ROPE or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: its config.json has {key} {rope!r}, and this decoder has unscaled rotations only")
    # Within a window of attention all tokens before are seen.
    slides = found.get("use_sliding_window", kind == "mistral") and found.get("sliding_window") is not None
    length = found["max_position_embeddings"]
    return ModelConfig(
        layers=found["num_hidden_layers"],
        width=found["hidden_size"],
        heads=found["num_attention_heads"],
        seq_len=min(length, found["sliding_window"]) if slides else length,
        vocab_size=found["vocab_size"],
        tied=found.get("tie_word_embeddings", False),
        biases=with_biases,
        norm_eps=found.get("rms_norm_eps", 1e-6),
        rms_norm=True,
        rotary=True,
        rope_theta=float(rope.get("rope_theta", found.get("rope_theta", 10000.0))),
        swiglu=True,
        mlp_width=found["intermediate_size"],
        kv_heads=found.get("num_key_value_heads"),
        head_width=found.get("head_dim"),
        qkv_biases=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
