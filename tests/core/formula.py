"""The gradient of a step, ĝ = g_B + w (g'_S − g_S), in float64 PyTorch: all logits, autograd, nothing saved."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from problems import B2, EPS, STEPS, moments

from fsam_core import Perturbed
from fsam_kernels.options import CROSS_ENTROPY, Loss

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


def momenta(weights: Arrays) -> Arrays:
    """First moments of AdamW."""
    return {k: v * 30 - 0.01 for k, v in moments(weights, seed=11).items()}


def remembered(weights: Arrays) -> Arrays:
    """The gradient of a previous step."""
    return {k: v * 100 - 0.05 for k, v in moments(weights, seed=12).items()}


LAST_NORMS = 0.5, 0.2
"""Of a previous step: ‖a‖, and what ε was divided by, over the clipping factor."""


def part_of(batches: list[Arrays], fraction: float) -> list[Arrays]:
    """S: whole micro-batches first, then every n-th row of the next one."""
    whole, share = divmod(Fraction(fraction).limit_denominator(64) * len(batches), 1)
    assert share.numerator <= 1
    rows = [{k: x[:: share.denominator] for k, x in batches[int(whole)].items()}] if share else []
    return [*batches[: int(whole)], *rows]


def rest_of(batches: list[Arrays], fraction: float) -> list[Arrays]:
    """The micro-batches and rows that are not in S."""
    whole, share = divmod(Fraction(fraction).limit_denominator(64) * len(batches), 1)
    if not share:
        return batches[int(whole) :]
    n = share.denominator
    cut = {k: x[np.arange(len(x)) % n != 0] for k, x in batches[int(whole)].items()}
    return [cut, *batches[int(whole) + 1 :]]


class Formula:
    """The formula of a model and a method.

    Attributes:
        hidden: (weights, batch) -> (h_NxD, w_VxD, b_V or None), in PyTorch.
        clip_norm, loss, ignore_index: as the step has them.
        holds: whether the scope holds the parameter of a name.
        drawn: the vector of a random ascent.
        steps: how many steps the second moments have seen.
    """

    def __init__(
        self,
        hidden: Callable[[Tensors, Tensors], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
        method: Perturbed,
        *,
        clip_norm: float | None = None,
        holds: Callable[[str], bool] = lambda name: True,
        drawn: Arrays | None = None,
        steps: int = STEPS,
        loss: Loss = CROSS_ENTROPY,
        ignore_index: int | None = None,
    ) -> None:
        self.hidden, self.method, self.clip_norm, self.holds, self.drawn = hidden, method, clip_norm, holds, drawn
        self.steps, self.loss_options, self.ignore_index = steps, loss, ignore_index
        self.last = method.norm_from == "previous"

    def __call__(self, weights: Arrays, batches: list[Arrays]) -> tuple[Arrays, float]:
        """(ĝ, ‖ε‖₂). The second moments are `moments`, the first `momenta`, the previous gradient `remembered`."""
        theta = _tensors(weights)
        state = {
            "nu": moments(weights),
            "momentum": momenta(weights),
            "-momentum": {k: -x for k, x in momenta(weights).items()},
            "previous": remembered(weights),
            "vasso": remembered(weights),
            "random": self.drawn or {},
        }
        known = {name: _tensors(tree) for name, tree in state.items()}
        if self.method.direction.source != "micro":
            g_hat, length = self._gradient(theta, batches, known)
        else:  # each micro-batch with a perturbation of its own, weighed by its tokens
            found = [self._gradient(theta, [batch], known) for batch in batches]
            weight = torch.stack([self.token_weights(batch).sum() for batch in batches])
            mean = lambda xs: sum(x * w for x, w in zip(xs, weight / weight.sum(), strict=True))
            g_hat, length = {k: mean([g[k] for g, _ in found]) for k in theta}, mean([x for _, x in found])
        return {k: x.numpy() for k, x in g_hat.items()}, float(length)

    def _gradient(
        self, theta: Tensors, batches: list[Arrays], known: dict[str, Tensors]
    ) -> tuple[Tensors, torch.Tensor]:
        method = self.method
        B, S = _joined(batches), _joined(part_of(batches, method.fraction))
        ascent = known.get(method.direction.name)
        if method.direction.name == "vasso":
            ascent = {k: 0.6 * ascent[k] + 0.4 * x for k, x in self._base(theta, B).items()}
        if ascent is None:
            share = method.share if method.ascent == "part" else method.fraction
            of = {"part": part_of(batches, share), "rest": rest_of(batches, share)}
            ascent = self._base(theta, _joined(of.get(str(method.ascent), batches)))
        epsilon = self._perturbation(theta, {k: x for k, x in ascent.items() if self.holds(k)}, known["nu"])
        moved = {k: x + epsilon.get(k, 0) for k, x in theta.items()}
        g_B, g_S, moved_S = self._base(theta, B), self._base(theta, S), self._moved(theta, moved, S)
        w = method.strength
        if method.form == "split":
            w = self._seen(S).sum() / self._seen(B).sum()
        g_hat = {k: g_B[k] + w * (moved_S[k] - g_S[k]) for k in theta}
        if method.combine:
            dot = lambda x, y: sum((x[k] * y[k]).sum() for k in theta)
            alpha, beta = method.combine(dot(g_B, g_B), dot(g_B, moved_S), dot(moved_S, moved_S))
            g_hat = {k: alpha * g_B[k] + beta * moved_S[k] for k in theta}
        return g_hat, _norm(epsilon)

    def _perturbation(self, theta: Tensors, a: Tensors, nu: Tensors) -> Tensors:
        method, c = self.method, 1.0
        if self.clip_norm is not None and method.norm != "none":
            c = min(1.0, self.clip_norm / (LAST_NORMS[0] if self.last else float(_norm(a))))
        a = {k: c * x for k, x in a.items()}
        d = dict(a)
        if method.precondition == "weights":
            d = {k: (theta[k].abs() + method.eta) ** 2 * x for k, x in a.items()}
        elif method.precondition:
            current = method.second_moment == "current"
            for k, x in a.items():
                v = B2 * nu[k] + (1 - B2) * x**2 if current else nu[k]
                d[k] = x / ((v / (1 - B2 ** (self.steps + current))).sqrt() + EPS)
        lengths = {k: _norm(d) for k in d}
        if method.norm == "per-tensor":
            lengths = {k: x.norm() for k, x in d.items()}
        elif method.norm == "dual":
            lengths = dict.fromkeys(d, sum((a[k] * d[k]).sum() for k in d).sqrt())
        elif method.norm == "none":
            lengths = dict.fromkeys(d, 1.0)
        if self.last:
            lengths = dict.fromkeys(d, c * LAST_NORMS[1])
        rho = method.rho / method.fraction if method.form == "split" else method.rho
        return {k: rho * x / lengths[k] for k, x in d.items()}

    def _moved(self, theta: Tensors, moved: Tensors, batch: Tensors) -> Tensors:
        """g' of a batch."""
        method = self.method
        if method.path == "sam":
            return self._base(moved, batch)
        if method.cut == "hidden":  # the trunk's Jacobian at θ+ε on h̄(θ), and the head's own gradient at θ
            head = [x.detach().requires_grad_() for x in self.hidden(theta, batch) if x is not None]
            hbar, *bars = torch.autograd.grad(self._loss(self._logits(*head), batch), head)
            trunk = _grad(lambda p: (self.hidden(p, batch)[0] * hbar).sum(), moved)
            own = lambda p: [x for x in self.hidden(p, batch)[1:] if x is not None]
            of_head = _grad(lambda p: sum((x * bar).sum() for x, bar in zip(own(p), bars, strict=True)), theta)
            return {k: trunk[k] + of_head[k] for k in theta}
        seen_at, jacobian_at = (theta, moved) if method.path == "functional" else (moved, theta)
        z = self._logits(*self.hidden(seen_at, batch)).detach().requires_grad_()
        (zbar,) = torch.autograd.grad(self._loss(z, batch), z)
        return _grad(lambda p: (self._logits(*self.hidden(p, batch)) * zbar).sum(), jacobian_at)

    def _base(self, at: Tensors, batch: Tensors) -> Tensors:
        return _grad(lambda p: self._loss(self._logits(*self.hidden(p, batch)), batch), at)

    def _logits(self, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        u, cap = h @ w.T + (0 if b is None else b), self.loss_options.soft_cap
        return u if cap is None else cap * torch.tanh(u / cap)

    def _loss(self, z_NxV: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """The mean over the tokens that count, by their weights."""
        o, y_N, seen_N = self.loss_options, batch["y"], self._seen(batch)
        logp_NxV, s = z_NxV.log_softmax(1), o.label_smoothing
        each_N = -(1 - s) * logp_NxV.gather(1, y_N.clamp(min=0)[:, None])[:, 0] - s * logp_NxV.mean(1)
        return ((each_N + o.z_loss * z_NxV.logsumexp(1) ** 2) * seen_N).sum() / seen_N.sum()

    def token_weights(self, batch: Arrays) -> torch.Tensor:
        """The weight of each token, 0 where its label is ignored."""
        return self._seen(_tensors(batch))

    def _seen(self, batch: Tensors) -> torch.Tensor:
        y_N = batch["y"]
        weights_N = batch.get("weights", torch.ones(len(y_N), dtype=torch.float64))
        ignored_N = (y_N < 0) | (y_N == (-1 if self.ignore_index is None else self.ignore_index))
        return torch.where(ignored_N, 0, weights_N)


def _grad(f: Callable[[Tensors], torch.Tensor], at: Tensors) -> Tensors:
    leaves = {k: x.detach().clone().requires_grad_() for k, x in at.items()}
    found = torch.autograd.grad(f(leaves), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _tensors(tree: Arrays) -> Tensors:
    return {k: torch.from_numpy(np.array(x)) for k, x in tree.items()}


def _joined(batches: list[Arrays]) -> Tensors:
    return _tensors({k: np.concatenate([b[k] for b in batches]) for k in batches[0]})


def _norm(tree: Tensors) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tree.values()]).norm()
