"""`check`: whether the loss of `features` is the model's own, by its value and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fsam_core.checking import Deviation, deviation
from fsam_core.errors import UserError
from fsam_core.methods import Plain
from fsam_core.torch.dtensor import local
from fsam_core.torch.from_model import FromModel
from fsam_core.torch.heads import outputs
from fsam_core.torch.parallel import detect_parallelism, plain_name
from fsam_core.torch.pass_config import Features
from fsam_core.torch.replay import Replay
from fsam_core.torch.step import Step


def check(
    model: nn.Module,
    features: Features,
    model_loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    rtol: float | None = None,
) -> Deviation:
    """Compare the plain loss of `features` with the model's own on one batch: one forward and backward pass of each.

        check(model, features, lambda model, batch: model(**batch).loss, batch)

    Both see the same random state and buffers. These, and `.grad` of every parameter, are afterwards as before. What
    only the gradient shows is seen as well: a low-rank adapter of the head whose second factor still is 0.

    Args:
        model: as in `Step`; of DistributedDataParallel its module is compared, by each rank for itself. With
            static_graph=True that comes before it is wrapped.
        features: as in `Step`.
        model_loss: (model, batch) -> mean loss over the labels of the batch, a scalar with its graph.
        batch: one batch, with labels.
        rtol: the largest relative error of either that passes. None for 1e-4 of the loss and 1e-3 of the gradient; in
            half floats for 5e-3 and 3e-2, where an auxiliary loss with a small coefficient is not seen any more. The
            gradient's error is that of the worst parameter: ‖difference‖ / ‖its gradient‖, or a tenth of the largest
            gradient's norm where that is larger.

    Raises:
        UserError: naming both losses, or the parameter whose gradient deviates most; for a static_graph.
    """
    if getattr(model, "static_graph", False):
        raise UserError(
            "model: DistributedDataParallel with static_graph=True would count these backward passes as its own and "
            "reduce no gradient any more; check the module before it is wrapped (FsamTrainer: check_first=False)"
        )
    inner = detect_parallelism(model).inner
    params = {plain_name(name): p for name, p in inner.named_parameters() if p.requires_grad}
    half = torch.is_autocast_enabled(next(iter(params.values())).device.type)

    def seen(model: nn.Module, batch: Any) -> Any:
        nonlocal half
        head = features(model, batch)
        half = half or any(x.dtype in (torch.bfloat16, torch.float16) for x in outputs(head))
        return head

    replay, kept = Replay(inner), {p: p.grad for p in params.values()}
    before = replay.state()
    once = features.called_once(inner) if isinstance(features, FromModel) else nullcontext()
    try:
        step = Step(inner, torch.optim.SGD(params.values(), lr=0.0), Plain(), features=seen)
        ours = float(step.gradient(batch))
        found = _take(params)
        replay.restore(before)
        with torch.enable_grad(), once:
            own_loss = model_loss(inner, batch)
            own_loss.backward()
        theirs, expected = float(own_loss.detach()), _take(params)
    finally:
        replay.restore(before)
        for p, gradient in kept.items():
            p.grad = gradient
    norms = lambda name, own: (float((found[name].double() - own.double()).norm()), float(own.double().norm()))
    gradients = {name: norms(name, own) for name, own in expected.items()}
    return deviation(ours, theirs, gradients, half=half, rtol=rtol)


def _take(params: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients, out of `.grad`."""
    found = {name: local(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in params.items()}
    for p in params.values():
        p.grad = None
    return found
