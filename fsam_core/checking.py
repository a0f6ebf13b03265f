"""The comparison behind `check` in both frameworks: whether a loss and its gradient are the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fsam_core.errors import UserError

RTOL = {False: (1e-4, 1e-3), True: (5e-3, 3e-2)}
"""By whether anything is computed in half floats: relative errors of loss and gradient that are rounding."""
FLOOR = 0.1
"""A gradient smaller than this share of the largest is compared with that share, since its own size may be rounding."""


class Deviation(NamedTuple):
    """Relative errors of the loss and of the gradient of the parameter where it is largest."""

    loss: float
    gradient: float


def deviation(
    ours: float, theirs: float, gradients: Mapping[str, tuple[float, float]], *, half: bool, rtol: float | None
) -> Deviation:
    """Compare a loss with the model's own, and the gradient of each parameter.

    Args:
        gradients: by the parameter's name, ‖difference‖ and ‖the model's own‖.
        half: whether anything was computed in half floats.
        rtol: the largest relative error of either that passes; None for `RTOL`.

    Raises:
        UserError: naming both losses, or the parameter whose gradient deviates most.
    """
    for_loss, for_gradient = RTOL[half] if rtol is None else (rtol, rtol)
    error = abs(ours - theirs) / max(abs(theirs), 1e-12)
    if not error <= for_loss:
        raise UserError(
            f"features: their loss is {ours:.6g} and the model's own {theirs:.6g} (relative error {error:.2g}); "
            "something between the head's input and the loss is not theirs (a scale, a soft-cap, another loss)"
        )
    floor = max(FLOOR * max(own for _, own in gradients.values()), 1e-30)
    worst, name = max((difference / max(own, floor), name) for name, (difference, own) in gradients.items())
    if not worst <= for_gradient:
        raise UserError(
            f"features: the gradient of {name!r} deviates from that of the model's own loss (relative error "
            f"{worst:.2g}); what depends on it is not in their head (an adapter of the head, an auxiliary loss)"
        )
    return Deviation(error, worst)
