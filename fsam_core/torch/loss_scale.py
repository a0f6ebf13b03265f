"""The loss scale of float16 models: small cotangents are multiplied by it, so that they are not rounded to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fsam_core.errors import UserError


class LossScale(NamedTuple):
    """How the scale changes; the defaults are those of `torch.amp.GradScaler`.

    Attributes:
        initial: the scale of the first step.
        growth: factor after `interval` steps in a row that were finite.
        backoff: factor after a step that was not, which is skipped.
        interval: how many steps that takes.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000


@dataclass
class Scaling:
    """The scale as it stands; the same on all ranks, since they skip a step all or none."""

    how: LossScale
    scale: float
    finite: int = 0
    """steps in a row since the last change"""

    @classmethod
    def begun(cls, how: LossScale) -> Scaling:
        """
        Raises:
            UserError: for a scale that could not grow, shrink, or be undone.
        """
        if not 0 < how.initial < float("inf"):
            raise UserError(f"loss_scale: initial must be a finite number > 0, got {how.initial!r}")
        if not (how.growth >= 1 and 0 < how.backoff <= 1 and how.interval >= 1):
            raise UserError(f"loss_scale: growth must be >= 1, backoff in (0, 1] and interval >= 1, got {how}")
        return cls(how, float(how.initial))

    def seen(self, skipped: bool) -> None:
        """Take note of a step."""
        self.finite = 0 if skipped else self.finite + 1
        if skipped:
            self.scale *= self.how.backoff
        elif self.finite == self.how.interval:
            self.scale, self.finite = self.scale * self.how.growth, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite": self.finite}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.finite = float(state["scale"]), int(state["finite"])
