"""`from_model`: features that call the whole model and capture the input of its head.

Everything around the trunk stays in force that way: the autocast which Accelerate wraps a model's forward in, PEFT,
torch.compile, checkpointing. Neither the product of the head nor what follows it is computed: the head's `forward` is
replaced for the call by one that raises, and the exception ends the model's forward pass there. A forward pre-hook in
place of that is not seen by a compiled model that was called before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsam_core.errors import UserError
from fsam_core.split import IGNORED, Of, part_of
from fsam_core.torch.heads import Head, LinearHead
from fsam_kernels.options import CROSS_ENTROPY, Loss
from fsam_kernels.torch.linear_cross_entropy import compute_dtype


class _Captured(BaseException):
    """Ends the forward pass; no `except Exception` of a model's own catches it."""


@dataclass(frozen=True)
class FromModel:
    """(model, batch) -> the model's `LinearHead`. The arguments are those of `from_model`."""

    head: str
    labels: Of
    shift: bool
    call: Callable[[nn.Module, Any], Any]
    token_weights: Of
    loss: Loss
    ignore_index: int | None
    count: Of

    def __call__(self, model: nn.Module, batch: Any) -> Head:
        return self.linear_head(model, batch)

    def linear_head(self, model: nn.Module, batch: Any) -> LinearHead:
        """The head alone, where `__call__` of a subclass returns more."""
        hidden, weight, bias = self.captured(model, batch)
        labels, token_weights = part_of(batch, self.labels), part_of(batch, self.token_weights)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise UserError(
                f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, and the loss of from_model is the cross "
                "entropy of whole numbers; write features that return Logits(logits, loss)"
            )
        if self.shift:
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
            token_weights = None if token_weights is None else F.pad(token_weights[..., 1:], (0, 1))
        return LinearHead(
            hidden,
            weight,
            labels,
            token_weights,
            bias,
            loss=self.loss,
            ignore_index=self.ignore_index,
            count=part_of(batch, self.count),
        )

    def captured(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the head's input [..., D] in the dtype of its product, its weight [V, D], its bias [V] or None)."""
        head = find_head(model, self.head)
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        with_graph = torch.is_grad_enabled()

        @torch._dynamo.disable
        def capture(hidden: Tensor) -> NoReturn:
            if with_graph and not torch.is_grad_enabled():
                raise UserError(
                    f"head: the model calls {self.head!r} without a graph, as in checkpoint(use_reentrant=True); use "
                    "use_reentrant=False, or leave the head out of what is checkpointed"
                )
            found.append((hidden.to(compute_dtype(hidden)), head.weight, head.bias))
            raise _Captured

        with replaced_forward(head, capture):
            try:
                self.call(model, batch)
            except _Captured:
                return found[0]
        raise UserError(
            f"head: the model never calls {self.head!r}; write features that return LinearHead(hidden, weight, labels)"
        )

    @contextmanager
    def called_once(self, model: nn.Module) -> Iterator[None]:
        """Whole forward passes of the model, in each of which the head must be called once: only the first is captured.

        Raises:
            UserError: where it was called more often.
        """
        calls: list[None] = []
        hook = find_head(model, self.head).register_forward_hook(lambda *_: calls.append(None))
        try:
            yield
        finally:
            hook.remove()
        if len(calls) > 1:
            raise UserError(
                f"head: the model calls {self.head!r} {len(calls)} times in one pass, of which from_model captures the "
                "first; write features that return Heads with a LinearHead for each"
            )


def from_model(
    head: str = "lm_head",
    labels: Of = "labels",
    *,
    shift: bool = False,
    call: Callable[[nn.Module, Any], Any] | None = None,
    token_weights: Of = None,
    loss: Loss = CROSS_ENTROPY,
    ignore_index: int | None = None,
    count: Of = None,
) -> FromModel:
    """`features` that call the whole model and capture the input of its head, which must be a plain linear layer.

        step = Step(model, optimizer, method, features=from_model("lm_head", labels="labels", shift=True))

    What the model does to the logits afterwards is not seen (a soft-cap or a scale; give `loss` for the former);
    `fsam_core.torch.check` compares with the model's own loss.

    Args:
        head: the name of the module, or the end of it: "lm_head" also finds "module.base_model.model.lm_head".
        labels: [...] int64 labels beside the head's input [..., D]: a key of the batch, an index of a tuple, or a
            function of the batch. A negative label is ignored.
        shift: whether the label of a position is the next one's, as where a causal model of transformers shifts the
            labels itself. The last position is then ignored, and token weights move with their labels.
        call: (model, batch) -> anything; None for model(**batch) of a mapping, model(*batch) of a tuple or list, and
            model(batch) of anything else.
        token_weights: [...] as `labels` is given; None for 1.
        loss: label smoothing, z-loss, soft-cap.
        ignore_index: a label ≥ 0 that is ignored too.
        count: as in `LinearHead`: a key, an index or a function of the batch.

    Raises:
        UserError: from the features, for a head that is not found, ambiguous, no plain linear layer, or never called.
    """
    return FromModel(head, labels, shift, call or _call, token_weights, loss, ignore_index, count)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another `forward`; a compiled model guards on it."""
    missing = object()
    own = module.__dict__.get("forward", missing)
    module.forward = forward
    try:
        yield
    finally:
        if own is missing:
            del module.forward
        else:
            module.forward = own


def find_head(model: nn.Module, name: str) -> nn.Linear:
    """The plain linear layer of that name, behind whatever wraps the model; of PEFT's saved copies the active one.

    Raises:
        UserError: where there is none, several, or one whose forward is not a linear layer's.
    """
    every = dict(model.named_modules())
    matches = [name] if name in every else [x for x in every if x.endswith(f".{name}")]
    if len(matches) != 1:
        got = f"no module has the name {name!r}" if not matches else f"{name!r} is any of {', '.join(matches)}"
        raise UserError(f"head: {got}; the widest linear layers of the model are {_widest(every)}")
    module = every[matches[0]]
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = getattr(module, "active_adapters", [])
        module = module.modules_to_save[active[0]] if active else module.original_module
    if hasattr(module, "base_layer"):
        raise UserError(
            f"head: {name!r} is an adapter of kind {type(module).__name__}, whose own product would be lost; leave it "
            "out of target_modules, or name it in modules_to_save"
        )
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        raise UserError(
            f"head: {name!r} is a {type(module).__name__} whose forward is not that of nn.Linear; write features that "
            "return LinearHead or Logits"
        )
    return module


def _widest(every: Mapping[str, nn.Module]) -> str:
    linear = {name: m.out_features for name, m in every.items() if isinstance(m, nn.Linear)}
    widest = [repr(name) for name, width in linear.items() if width == max(linear.values())]
    return ", ".join(widest[:4]) or "none"


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
