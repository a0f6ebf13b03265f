"""Hand-written Functional-SAM of several batches, and the distance of `.grad` from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from integrations_models import reference

Outputs = Callable[[nn.Module, Any], Sequence[Tensor]]


def functional(
    model: nn.Module, batches: Sequence[Any], outputs: Outputs, loss: Callable[..., Tensor], rho: float
) -> dict[str, Tensor]:
    """ĝ by name along ε = ρ g / ‖g‖₂.

    Args:
        outputs: (model, batch) -> z, the tensors that the loss depends on.
        loss: one list of z a batch -> the loss of them all.
    """
    counts: list[int] = []

    def every(model: nn.Module) -> tuple[Tensor, ...]:
        z = [tuple(outputs(model, batch)) for batch in batches]
        counts[:] = map(len, z)
        return tuple(x for one in z for x in one)

    def whole(*z: Tensor) -> Tensor:
        given = iter(z)
        return loss(*([next(given) for _ in range(count)] for count in counts))

    return reference(model, every, whole, rho)


def off_by(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """‖.grad − expected‖ / ‖expected‖ over all parameters."""
    grads = {name: p.grad for name, p in model.named_parameters() if name in expected}
    dense = {k: torch.zeros_like(expected[k]) if g is None else g.to_dense() for k, g in grads.items()}
    error = torch.cat([(dense[k] - x).flatten() for k, x in expected.items()]).norm()
    return float(error / torch.cat([x.flatten() for x in expected.values()]).norm())
