"""What goes from one step in PyTorch to the next: what the ascent remembers, the last correction, the last norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsam_core.errors import UserError
from fsam_core.methods import Method, Perturbed
from fsam_core.schedules import Schedule
from fsam_core.torch import gradients
from fsam_core.torch.dtensor import like, local
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.parallel import Parallel
from fsam_core.torch.perturbation import StepResult


class Carried:
    """The state of a method between steps. A skipped step leaves it as it is.

    Attributes:
        previous: what the ascent remembers: ĝ of the last step, or a memory of its own.
        correction: the last correction, for a schedule that reuses it.
        norms: ‖a‖ and the divisor of ε of the last corrected step, for norm_from="previous"; 0 before the first.
    """

    def __init__(self, method: Method, schedule: Schedule) -> None:
        self.previous: Gradients = {}
        self.correction: Gradients = {}
        self.norms = torch.zeros(2, dtype=torch.float64)
        perturbed = method if isinstance(method, Perturbed) else None
        self._remembers = perturbed.direction.remembers if perturbed else False
        self._reuse = perturbed.reuse if perturbed else None
        self._keeps_norms = perturbed is not None and perturbed.norm_from == "previous"
        self.keeps_correction = perturbed is not None and schedule.between == "reuse"

    @property
    def keeps(self) -> bool:
        """Whether anything goes from one step to the next."""
        return bool(self._remembers or self.keeps_correction or self._keeps_norms)

    def reused(self, parallel: Parallel, g: Gradients) -> Gradients:
        """ĝ of a step that reuses the last correction, in the arrays of g."""
        if self._reuse is not None:
            apply = self._reuse.apply
            gradients.combine(parallel, self.correction, g, lambda cc, gc, gg: apply(gg, gc, cc)[::-1])
            return g
        return {p: x.add_(self.correction[p]) if p in self.correction else x for p, x in g.items()}

    def update(self, result: StepResult, g_hat: Gradients, norms: Sequence[Tensor | None]) -> None:
        """After a step that was taken.

        Args:
            norms: those of `result.epsilon`, over all ranks.
        """
        if self._remembers is True:
            # A copy: the optimizer's zero_grad(set_to_none=False) writes over what is in `.grad`.
            self.previous = {p: g.clone() for p, g in g_hat.items()}
        if result.correction is not None:
            self.correction = result.correction
        if result.epsilon is not None:
            self.previous = result.epsilon.memory or self.previous
            given = [x for x in norms if x is not None]
            self.norms = torch.stack([x.detach().double() for x in given]) if given else self.norms

    def state_dict(self, params: Sequence[Any]) -> dict[str, Any]:
        """One tensor for each of params in "previous" and "correction", where the method has them; "norms"."""
        state: dict[str, Any] = {"norms": self.norms.clone()} if self._keeps_norms else {}
        for name, of in self._kept().items():
            every = {p: like(p, of[p]) if p in of else torch.zeros_like(p) for p in params}
            state[name] = {str(i): x for i, x in enumerate(every.values())}
        return state

    def load(self, state: dict[str, Any], params: Sequence[Any]) -> None:
        """Restore what `state_dict` returned; what it lacks starts from zero.

        Raises:
            UserError: for what is not of these params.
        """
        self.norms = state.get("norms", torch.zeros(2)).double() if self._keeps_norms else self.norms
        for name in self._kept():
            given = state.get(name, {})
            of = {p: given.get(str(i)) for i, p in enumerate(params)}
            if len(given) > len(of) or any(x is not None and x.shape != p.shape for p, x in of.items()):
                raise UserError(
                    f"state: {name!r} has {len(given)} tensors, which are not of the shapes of the optimizer's "
                    f"{len(of)} parameters; load it with the model and the parameter groups that it was saved with"
                )
            setattr(self, name, {p: local(x.to(p.device, p.dtype)) for p, x in of.items() if x is not None})

    def _kept(self) -> dict[str, Gradients]:
        kept = {"previous": self.previous} if self._remembers else {}
        return kept | ({"correction": self.correction} if self.keeps_correction else {})
