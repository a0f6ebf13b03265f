"""The loss scale of float16 models: a factor that keeps small cotangents from being rounded to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fsam_core.errors import UserError


class LossScale(NamedTuple):
    """How the scale changes; the defaults are those of `torch.amp.GradScaler`.

    Attributes:
        initial: the scale of the first step.
        growth: factor after `interval` consecutive finite steps.
        backoff: factor after a step that was not finite, which is skipped.
        interval: consecutive finite steps before the scale grows.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000


def check_scaling(loss_scale: LossScale | None, scaler: Any, has_masters: bool) -> None:
    """Check that what scales the cotangents fits the optimizers.

    Raises:
        UserError: for a loss scale without float32 masters, and for a `torch.amp.GradScaler` beside either.
    """
    if loss_scale is not None and not has_masters:
        raise UserError(
            "loss_scale: it is undone where gradients go to float32 masters; give an AdamW with `copies`, as of "
            "masters(model, torch.float16), or scaler=torch.amp.GradScaler() for float32 weights under autocast"
        )
    if scaler is not None and (loss_scale is not None or has_masters):
        raise UserError("scaler: masters take loss_scale=LossScale() instead; a GradScaler does not know them")


@dataclass
class Scaling:
    """The current scale; the same on all ranks, because either all of them skip a step or none does."""

    how: LossScale
    scale: float
    finite: int = 0
    """consecutive finite steps since the last change"""

    @classmethod
    def begin(cls, how: LossScale) -> Scaling:
        """
        Raises:
            UserError: for a scale that cannot grow, shrink, or be divided out.
        """
        if not 0 < how.initial < float("inf"):
            raise UserError(f"loss_scale: initial must be a finite number > 0, got {how.initial!r}")
        if not (how.growth >= 1 and 0 < how.backoff <= 1 and how.interval >= 1):
            raise UserError(f"loss_scale: growth must be >= 1, backoff in (0, 1] and interval >= 1, got {how}")
        return cls(how, float(how.initial))

    def seen(self, skipped: bool) -> None:
        """Update the scale after a step."""
        self.finite = 0 if skipped else self.finite + 1
        if skipped:
            self.scale *= self.how.backoff
        elif self.finite == self.how.interval:
            self.scale, self.finite = self.scale * self.how.growth, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite": self.finite}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.finite = float(state["scale"]), int(state["finite"])
