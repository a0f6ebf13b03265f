"""`features_of`: the features of a model from transformers, read from its configuration."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.torch import Heads, LinearHead, Loss, Outputs
from fsam_core.torch.from_model import FromModel, from_model, replaced_forward

CAUSAL = (None, "ForCausalLM", "ForConditionalGeneration")
"""The loss types of transformers that shift their labels; a decoder behind an encoder does not."""


@dataclass(frozen=True)
class ScaledHead(FromModel):
    """A head whose logits the model multiplies by a constant (Cohere, Granite)."""

    scale: float

    def __call__(self, model: nn.Module, batch: Any) -> LinearHead:
        head = self.linear_head(model, batch)
        return dataclasses.replace(head, hidden=head.hidden * self.scale)


@dataclass(frozen=True)
class PooledHead(FromModel):
    """A decoder's classifier, which transformers applies to the last position of a row that is no padding.

    Attributes:
        padding: the id of the padding token, None for rows without padding.
    """

    padding: int | None

    def __call__(self, model: nn.Module, batch: Any) -> LinearHead:
        head, ids_BxL = self.linear_head(model, batch), batch["input_ids"]
        if self.padding is None and len(ids_BxL) > 1:
            raise UserError(f"model: pad_token_id is None, which allows one row a batch; got {len(ids_BxL)}")
        rows_B, places_L = (torch.arange(n, device=ids_BxL.device) for n in ids_BxL.shape)
        last_B = -1 if self.padding is None else (places_L * (ids_BxL != self.padding)).argmax(1)
        return dataclasses.replace(head, hidden=head.hidden[rows_B, last_B])


@dataclass(frozen=True)
class WithRouter(FromModel):
    """A head beside the load-balancing loss of a mixture of experts.

    Attributes:
        trunk: the name of the module that returns `router_logits`.
        balance: (router logits of each layer, attention mask or None) -> load-balancing loss.
        coefficient: of that loss in the sum.
    """

    trunk: str
    balance: Callable[[Any, Any], Tensor]
    coefficient: float

    def __call__(self, model: nn.Module, batch: Any) -> Heads:
        trunk, found = _submodule(model, self.trunk), []
        forward = trunk.forward

        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            found.append(output.router_logits)
            return output

        with replaced_forward(trunk, keeping):
            head = self.linear_head(model, batch)
        mask = batch.get("attention_mask")
        return Heads([head, Outputs(found[0], lambda z: self.balance(z, mask))], weights=[1.0, self.coefficient])


def features_of(model: nn.Module, *, label_smoothing: float = 0.0) -> FromModel:
    """The features whose loss is the model's own: causal and masked language models, T5, one-label classification.

    Batches are mappings with "labels". Read from the configuration are the shift of the labels, a final soft-cap
    (Gemma 2), a scale of the logits (Cohere, Granite), and, with `output_router_logits`, the load-balancing loss of a
    router (Mixtral, Qwen-MoE). `fsam_core.torch.check` tells whether that is all.

    Args:
        model: of transformers, also in PEFT.
        label_smoothing: of the training arguments.

    Raises:
        UserError: for a model without a linear head, prompts that PEFT puts in front of the tokens, a loss that is no
            cross entropy, or an auxiliary loss that is not known.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING":
            raise UserError(
                f"model: PEFT's {adapter.peft_type} puts tokens without labels in front; write features that return "
                "LinearHead with as many labels of -100"
            )
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = base.config.get_text_config()
    kind = getattr(base, "loss_type", None)
    if getattr(config, "problem_type", None) not in (None, "single_label_classification") or (
        kind in ("ForSequenceClassification", "ForImageClassification") and config.num_labels == 1
    ):
        raise UserError(
            f"model: the loss of a {type(base).__name__} with problem_type={config.problem_type!r} is no cross "
            "entropy; write features that return Logits(logits, loss)"
        )
    if kind is None and base.get_output_embeddings() is None:
        raise UserError(
            f"model: the loss of a {type(base).__name__} is not known; write features that return Logits(logits, loss)"
        )
    common = from_model(
        _head_name(base),
        shift=kind in CAUSAL and not base.config.is_encoder_decoder,
        loss=Loss(label_smoothing=label_smoothing, soft_cap=getattr(config, "final_logit_softcapping", None)),
    )
    fields = {f.name: getattr(common, f.name) for f in dataclasses.fields(common)}
    if kind == "ForSequenceClassification" and common.head == "score":
        return PooledHead(**fields, padding=config.pad_token_id)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    routed = getattr(config, "output_router_logits", False)
    if routed and scale != 1:
        raise UserError(f"model: {type(base).__name__} has a logit scale and a router loss; write features with Heads")
    if scale != 1:
        return ScaledHead(**fields, scale=scale)
    return _with_router(base, config, fields) if routed else common


def _with_router(base: Any, config: Any, fields: dict[str, Any]) -> WithRouter:
    balance = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(base, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
    if balance is None or coefficient is None or not hasattr(base, "num_experts_per_tok"):
        raise UserError(
            f"model: the router loss of {type(base).__name__} is not known; write features that return Heads with "
            "Outputs(router_logits, loss), or set config.output_router_logits = False"
        )
    experts, top = base.num_experts, base.num_experts_per_tok
    return WithRouter(
        **fields,
        trunk=_name_of(base, base.get_decoder()),
        balance=lambda logits, mask: balance(logits, experts, top, mask),
        coefficient=coefficient,
    )


def _head_name(base: Any) -> str:
    head = base.get_output_embeddings()
    if head is not None:
        return _name_of(base, head)
    names = [name for name in ("classifier", "score") if hasattr(base, name)]
    if not names:
        raise UserError(
            f"model: {type(base).__name__} has no output embeddings and no classifier; give features=from_model(...)"
        )
    return names[0]


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def _submodule(model: nn.Module, name: str) -> Any:
    """The module of that name in the model inside the wrappers, which is the deepest that has it."""
    found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")]
    return found[-1]
