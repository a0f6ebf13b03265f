"""The step in PyTorch: an object to put where forward, backward and `optimizer.step()` stand.

    step = Step(model, optimizer, FunctionalSAM(rho=0.5, precondition="adam"), features=features, clip_norm=1.0)
    loss = step(batch)             # or step([micro0, micro1, ...]); scheduler, logging and saving as usual

`features(model, batch)` returns a `LinearHead` or `Logits`. The optimizer stays the user's own: its state and its
checkpoints know nothing of fsam. Outside a call the model holds θ, never θ+ε, also when a pass raised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fsam_core import backends, parts
from fsam_core.errors import UserError
from fsam_core.methods import SAM, FunctionalSAM, LogitSAM, Method, Perturbed, Plain, check_rho

backends.require("torch")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils import _pytree  # noqa: E402

from fsam_core import torch_heads as heads  # noqa: E402
from fsam_core.torch_heads import LinearHead, Logits  # noqa: E402
from fsam_kernels.memory import AUTO, Memory  # noqa: E402
from fsam_kernels.options import Loss  # noqa: E402

__all__ = [
    "SAM",
    "FunctionalSAM",
    "Info",
    "LinearHead",
    "LogitSAM",
    "Logits",
    "Loss",
    "Memory",
    "Plain",
    "Step",
    "UserError",
    "mean_loss",
]

Features = Callable[[nn.Module, Any], "LinearHead | Logits"]


class Info(NamedTuple):
    """What the last step saw."""

    loss: float
    """Mean loss at θ."""
    perturbed_loss: float
    """Mean loss at θ+ε, on S, where the method evaluates it (sam, logit), else NaN."""
    weight: float
    """Sum of the token weights over all micro-batches."""
    base_norm: float
    """‖g‖₂ of the plain gradient."""
    grad_norm: float
    """‖ĝ‖₂ of the gradient the optimizer received, before clipping."""
    perturbation_norm: float
    """‖ε‖₂; 0 where nothing is perturbed."""
    skipped: bool
    """Whether the update was left out because a loss or a norm of either pass was not finite."""


class Step:
    """One optimizer step of `method`, in place of forward, backward and `optimizer.step()`.

    Attributes:
        ops: the backend's operations.
        info: what the last step saw, None before the first.
        steps: optimizer steps taken; the argument of a ρ schedule.
        skipped_steps: steps left out because something was not finite. The optimizer does not see those at all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        features: Features,
        clip_norm: float | None = None,
        memory: Memory = AUTO,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            model: any module; its parameters must be the optimizer's.
            optimizer: with precondition="adam" one that keeps `exp_avg_sq`: Adam, AdamW, NAdam, RAdam.
            method: `Plain`, `SAM`, `FunctionalSAM` or `LogitSAM`.
            features: (model, batch) -> `LinearHead` or `Logits`. Called once a pass. Random draws from PyTorch's own
                generators are the same in both passes; draws from a private `torch.Generator` are not replayed.
            clip_norm: global norm that the final gradient is clipped to, once; None for no clipping.
            memory: what may be spent on the head: working bytes, and whether its cotangent is kept or recomputed.
            backend: "torch", "triton" or "auto" (default: FSAM_BACKEND, then auto).

        Raises:
            UserError: for an optimizer without Adam's settings, clip_norm ≤ 0, or an unknown backend.
        """
        if not isinstance(method, Plain | Perturbed):
            raise UserError(f"method must be Plain(), SAM(...), FunctionalSAM(...) or LogitSAM(...), got {method!r}")
        if isinstance(method, Perturbed) and method.precondition == "adam":
            lacks = any("betas" not in group or "eps" not in group for group in optimizer.param_groups)
            if lacks or isinstance(optimizer, torch.optim.Adamax):
                kind = type(optimizer).__name__
                raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kind}")
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"clip_norm must be > 0, or None for no clipping; got {clip_norm!r}")
        self.model, self.optimizer, self.method, self.features = model, optimizer, method, features
        self.clip_norm, self.memory = clip_norm, memory
        self.steps = self.skipped_steps = 0
        self.info: Info | None = None
        chosen = backends.choose("torch", backend)
        for device in sorted({p.device.type for p in model.parameters()}):
            backends.check_device(chosen.name, device)
        self.ops = backends.load("torch", chosen.name)

    def __call__(self, batch: Any) -> Tensor:
        """Take one step; returns the mean loss at θ, detached.

        `batch` is whatever `features` takes; a list is taken as micro-batches, whose gradient is that of one batch of
        them all, each token weighing the same. If either pass raises, weights and optimizer state are as before.
        """
        loss = self.gradient(batch)
        assert self.info is not None
        if self.info.skipped:
            self.skipped_steps += 1
        else:
            self.optimizer.step()
            self.steps += 1
        return loss

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the model's and the optimizer's own state."""
        return {"steps": self.steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.skipped_steps = int(state["steps"]), int(state["skipped_steps"])

    def gradient(self, batch: Any) -> Tensor:
        """The first half of a step: leaves ĝ, clipped, in every parameter's `.grad` and takes no optimizer step.

        Returns the mean loss at θ, detached; whether ĝ is to be used says `info.skipped`.
        """
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise UserError("batch: got an empty list of micro-batches; give at least one")
        method = self.method
        part, rest = parts.split(batches, method.fraction, _flatten) if isinstance(method, Perturbed) else (batches, [])
        try:
            cut = method.cut if isinstance(method, Perturbed) and method.path == "functional" else None
            loss, weight, kept = self._base_pass(part, cut=cut)
            g_S = {p: _grad(p) for p in self._params()}
            if rest:
                loss, weight = self._add(rest, loss, weight, g_S)
            params = self._params()
            if not params:
                raise UserError(
                    "optimizer: none of its parameters got a gradient; is the model frozen, or not its own?"
                )
            base_norm = norm = _norm([p.grad for p in params])
            moved_loss = never = loss.new_tensor(math.nan)
            length = torch.zeros_like(base_norm)
            if isinstance(method, Perturbed):
                full = method.ascent == "full"
                ascent = [_grad(p) if full else g_S.get(p, torch.zeros_like(p)) for p in params]
                moved, length = self._perturbed(params, ascent, base_norm if full else _norm(ascent))
                del ascent
                left = {} if method.exact else self._less(g_S, method.strength)
                del g_S
                with self._statistics_kept(), self._random_kept():
                    if method.path == "functional":  # J(θ+ε)ᵀ z̄(θ)
                        with self._at(params, moved):
                            self._pull_back(part, kept)
                    elif method.path == "sam":  # J(θ+ε)ᵀ z̄(θ+ε)
                        with self._at(params, moved):
                            moved_loss, _, _ = self._base_pass(part, replay=kept)
                    else:  # J(θ)ᵀ z̄(θ+ε)
                        with self._at(params, moved):
                            moved_loss, moved_kept = self._cotangent_pass(part, kept)
                        self._pull_back(part, moved_kept)
                for p, gradient in left.items():  # ĝ = (g_B − w g_S) + w g'_S
                    p.grad = gradient if p.grad is None else gradient.add_(p.grad, alpha=method.strength)
                norm = _norm([p.grad for p in self._params()])
        except BaseException:
            self._clear()
            raise
        seen = [loss, moved_loss, weight, base_norm, norm, length]
        # The one place where the host waits for the device.
        values = torch.stack([x.detach().to(norm.device, torch.float64) for x in seen]).tolist()
        evaluated = [v for v, x in zip(values, seen, strict=True) if x is not never]
        self.info = info = Info._make([*values, not all(map(math.isfinite, evaluated))])
        if self.clip_norm is not None and not info.skipped and info.grad_norm > self.clip_norm:
            torch._foreach_mul_([_grad(p) for p in self._params()], self.clip_norm / info.grad_norm)
        return loss

    # --- the passes ---------------------------------------------------------------------------------------------------

    def _base_pass(
        self, batches: Sequence[Any], replay: Sequence[_Kept] | None = None, cut: str | None = None
    ) -> tuple[Tensor, Tensor, list[_Kept]]:
        """(loss, total weight, z̄ and random state of every micro-batch) at the present weights; J ᵀ z̄ into `.grad`.

        `cut` is where z̄ is held for a second pass, None if there is none. At the "hidden" states it is the cotangents
        of the head's inputs, and those of its weight and bias are summed in the first micro-batch's.
        """
        self._clear()
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        kept: list[_Kept] = []
        unit: Tensor | None = None
        for i, batch in enumerate(batches):
            random = self._random_state()
            if replay is not None:
                self._set_random_state(replay[i].random)
            head = heads.flat(self.features(self.model, batch))
            weight = heads.weight(head)
            # Everything is summed in units of the first micro-batch's weight, so that half floats do not overflow; with
            # one micro-batch that is the mean already.
            unit = torch.where(weight > 0, weight, 1) if unit is None else unit
            holds = cut == "logits" and heads.keeps(head, len(batches), self.memory)
            loss, cotangent, out = heads.cotangent(self.ops, head, unit, self.memory, gradient=True, keep=holds)
            assert out is not None
            if cut == "hidden":
                if isinstance(head, Logits):
                    raise UserError("cut: 'hidden' needs features to return a LinearHead, got Logits")
                cotangent = out if not kept else out[:1]
                for total, more in zip(kept[0].cotangent[1:] if kept else (), out[1:], strict=False):
                    total.add_(more)
            heads.backward(head, out)
            losses.append(loss)
            weights.append(weight)
            kept.append(_Kept(cotangent, unit, random))
        if len(batches) == 1 or unit is None:
            return losses[0], weights[0], kept
        total = torch.stack(weights).sum()
        factor = unit / torch.where(total > 0, total, 1)
        for p in self._params():
            _grad(p).mul_(factor.to(_grad(p)))
        return torch.stack(losses).sum() * factor, total, [self._rescaled(k, factor) for k in kept]

    def _add(self, rest: Sequence[Any], loss: Tensor, weight: Tensor, g_S: dict) -> tuple[Tensor, Tensor]:
        """Turn what `_base_pass` gave for S into the whole batch's: (loss, weight), and g_B in `.grad`."""
        other_loss, other_weight, _ = self._base_pass(rest)
        total = weight + other_weight
        mine, other = (w / torch.where(total > 0, total, 1) for w in (weight, other_weight))
        for p in self._params():
            _grad(p).mul_(other.to(_grad(p)))
        for p, g in g_S.items():
            share = g * mine.to(g)
            p.grad = share if p.grad is None else p.grad.add_(share)
        return loss * mine + other_loss * other, total

    def _less(self, g_S: dict, strength: float) -> dict[nn.Parameter, Tensor]:
        """g_B − w g_S for every parameter, from the g_B in `.grad`."""
        of = {p: _grad(p).clone() if g_S.get(p) is p.grad else _grad(p) for p in self._params()}
        return {p: g.sub_(g_S[p], alpha=strength) if p in g_S else g for p, g in of.items()}

    def _cotangent_pass(self, batches: Sequence[Any], replay: Sequence[_Kept]) -> tuple[Tensor, list[_Kept]]:
        """(loss, z̄ of every micro-batch) at the present weights: a forward pass alone."""
        losses, kept = [], []
        for batch, base in zip(batches, replay, strict=True):
            self._set_random_state(base.random)
            with torch.no_grad():
                head = heads.flat(self.features(self.model, batch))
            holds = heads.keeps(head, len(batches), self.memory)
            loss, cotangent, _ = heads.cotangent(self.ops, head, base.unit, self.memory, gradient=False, keep=holds)
            losses.append(loss)
            kept.append(_Kept(cotangent, base.unit, base.random))
        return torch.stack(losses).sum(), kept

    def _pull_back(self, batches: Sequence[Any], kept: Sequence[_Kept]) -> None:
        """Jᵀ z̄ into `.grad`: the Jacobian at the present weights, cotangents from anywhere. No logits, no loss."""
        self._clear()
        for batch, base in zip(batches, kept, strict=True):
            self._set_random_state(base.random)
            head = heads.flat(self.features(self.model, batch))
            heads.backward(head, heads.pulled_back(self.ops, head, base.cotangent, self.memory))

    @staticmethod
    def _rescaled(kept: _Kept, factor: Tensor) -> _Kept:
        z = kept.cotangent
        if isinstance(z, tuple):
            z = tuple(x.mul_(factor.to(x)) for x in z)
        elif isinstance(z, Tensor):
            z = z * factor.to(z)
        else:
            z = dataclasses.replace(z, weights_N=z.weights_N * factor.to(z.weights_N))
        return _Kept(z, kept.unit / factor, kept.random)

    # --- the perturbation ---------------------------------------------------------------------------------------------

    def _perturbed(self, params: list[nn.Parameter], grads: list[Tensor], norm: Tensor) -> tuple[list[Tensor], Tensor]:
        """(θ + ε for each of params, ‖ε‖₂) from gradients of this norm; ε = 0 where they are 0. Nothing here waits."""
        method, ops = self.method, self.ops
        assert isinstance(method, Perturbed)
        rho = check_rho(method.rho_at(self.steps), f"rho({self.steps})")
        clip = 1.0 if self.clip_norm is None else (self.clip_norm / norm).clamp(max=1.0)
        v, adam = self._moments(params) if method.precondition == "adam" else (None, None)
        sumsq, dot = ops.preconditioned_norm(grads, v, clip=clip, adam=adam)
        square = sumsq if method.norm == "l2" else dot
        scale = torch.where(square == 0, 0, rho / torch.where(square == 0, 1, square).sqrt())
        return ops.perturb(params, grads, v, scale, clip=clip, adam=adam), scale * sumsq.sqrt()

    def _moments(self, params: list[nn.Parameter]) -> tuple[list[Tensor], list[Any]]:
        """(AdamW's second moment of each parameter before this step, its settings for the direction)."""
        assert isinstance(self.method, Perturbed)
        current = self.method.second_moment == "current"
        settings = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        moments, adam = [], []
        for p in params:
            state = self.optimizer.state.get(p, {})
            if state and "exp_avg_sq" not in state:
                kind = type(self.optimizer).__name__
                raise UserError(f"optimizer: precondition='adam' needs one that keeps exp_avg_sq (AdamW), got {kind}")
            moments.append(state["exp_avg_sq"] if state else torch.zeros_like(p))
            b2 = float(settings[p]["betas"][1])
            correction = _bias_correction(b2, state.get("step", 0), current)
            adam.append(self.ops.Adam(b2, float(settings[p]["eps"]), correction, current))
        return moments, adam

    @contextmanager
    def _at(self, params: list[nn.Parameter], moved: list[Tensor]) -> Iterator[None]:
        """The model at other weights. The parameters only point elsewhere meanwhile, so θ comes back to the bit."""
        original = [p.data for p in params]
        try:
            for p, data in zip(params, moved, strict=True):
                p.data = data
            torch.clear_autocast_cache()  # inside the user's autocast it holds casts of θ
            yield
        finally:
            for p, data in zip(params, original, strict=True):
                p.data = data
            torch.clear_autocast_cache()

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Running statistics (BatchNorm's) as they are before: one step updates them once, in its base pass."""
        modules = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)

    def _params(self) -> list[nn.Parameter]:
        """The optimizer's parameters that have a gradient at the moment."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    # --- randomness: both passes draw the same ------------------------------------------------------------------------

    def _random_state(self) -> dict[Any, Tensor]:
        devices = {p.device for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}
        return {None: torch.get_rng_state(), **{d: torch.get_device_module(d).get_rng_state(d) for d in devices}}

    @contextmanager
    def _random_kept(self) -> Iterator[None]:
        """Whatever is replayed meanwhile, the generators end where the base pass left them."""
        random = self._random_state()
        try:
            yield
        finally:
            self._set_random_state(random)

    def _set_random_state(self, random: dict[Any, Tensor]) -> None:
        for device, state in random.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


def mean_loss(
    features: Features, *, memory: Memory = AUTO, backend: str | None = None
) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> mean loss with the same head, for evaluation: no gradient, no N×V tensor."""
    ops = backends.load("torch", backend)

    @torch.no_grad()
    def loss(model: nn.Module, batch: Any) -> Tensor:
        head = heads.flat(features(model, batch))
        weight = heads.weight(head)
        return heads.cotangent(ops, head, torch.where(weight > 0, weight, 1), memory, gradient=False, keep=False)[0]

    return loss


def _flatten(batch: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, tree = _pytree.tree_flatten(batch)
    return leaves, lambda leaves: _pytree.tree_unflatten(leaves, tree)


class _Kept(NamedTuple):
    """What the second pass needs of a micro-batch: z̄, what it was divided by, and the random state it began with."""

    cotangent: Any
    unit: Tensor
    random: dict[Any, Tensor]


def _bias_correction(b2: float, step: Tensor | float, current: bool) -> Tensor | float:
    """1 − β₂ⁿ for the n steps that the moment has seen, 1 for none. A count that lives on a device stays there."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        n = step.double() + current
        return torch.where(n > 0, 1 - b2**n, 1)
    count = int(step) + current
    return 1 - b2**count if count > 0 else 1.0


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _norm(tensors: list[Any]) -> Tensor:
    """‖·‖₂ over all tensors, each summed in float32 or wider."""
    if not tensors:
        return torch.zeros(())
    wide = [torch.promote_types(x.dtype, torch.float32) for x in tensors]
    norms = [torch.linalg.vector_norm(x, dtype=kind) for x, kind in zip(tensors, wide, strict=True)]
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))
