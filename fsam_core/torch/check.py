"""`check`: whether the loss of `features` is the model's own, by its value and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsam_core.errors import UserError
from fsam_core.methods import Plain
from fsam_core.torch.dtensor import local
from fsam_core.torch.from_model import FromModel
from fsam_core.torch.heads import outputs
from fsam_core.torch.parallel import detect_parallelism, plain_name
from fsam_core.torch.passes import Features
from fsam_core.torch.replay import Replay
from fsam_core.torch.step import Step

RTOL = {False: (1e-4, 1e-3), True: (5e-3, 3e-2)}
"""By whether anything is computed in half floats: relative errors of loss and gradient that are rounding."""
FLOOR = 0.1
"""A gradient smaller than this share of the largest is compared with that share, since its own size may be rounding."""


class Deviation(NamedTuple):
    """Relative errors of the loss and of the gradient of the parameter where it is largest."""

    loss: float
    gradient: float


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
        model: as in `Step`; of DistributedDataParallel its module is compared, by each rank for itself.
        features: as in `Step`.
        model_loss: (model, batch) -> mean loss over the labels of the batch, a scalar with its graph.
        batch: one batch, with labels.
        rtol: the largest relative error of either that passes. None for 1e-4 of the loss and 1e-3 of the gradient; in
            half floats for 5e-3 and 3e-2, where an auxiliary loss with a small coefficient is not seen any more. The
            gradient's error is that of the worst parameter: ‖difference‖ / ‖its gradient‖, or a tenth of the largest
            gradient's norm where that is larger.

    Raises:
        UserError: naming both losses, or the parameter whose gradient deviates most.
    """
    parallel = detect_parallelism(model)
    inner = parallel.inner
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
    for_loss, for_gradient = RTOL[half] if rtol is None else (rtol, rtol)
    error = abs(ours - theirs) / max(abs(theirs), 1e-12)
    if not error <= for_loss:
        raise UserError(
            f"features: their loss is {ours:.6g} and the model's own {theirs:.6g} (relative error {error:.2g}); "
            "something between the head's input and the loss is not theirs (a scale, a soft-cap, another loss)"
        )
    worst, name = _worst(found, expected)
    if not worst <= for_gradient:
        raise UserError(
            f"features: the gradient of {name!r} deviates from that of the model's own loss (relative error "
            f"{worst:.2g}); what depends on it is not in their head (an adapter of the head, an auxiliary loss)"
        )
    return Deviation(error, worst)


def _take(params: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients, out of `.grad`."""
    found = {name: local(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in params.items()}
    for p in params.values():
        p.grad = None
    return found


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    norms = {name: float(x.double().norm()) for name, x in expected.items()}
    floor = max(FLOOR * max(norms.values()), 1e-30)
    errors = {name: float((found[name].double() - x.double()).norm()) for name, x in expected.items()}
    return max((error / max(norms[name], floor), name) for name, error in errors.items())
