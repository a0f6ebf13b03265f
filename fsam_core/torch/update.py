"""What becomes of ĝ: clipped and given to the optimizers, or skipped; by the host, or on the device without a wait."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsam_core.torch import gradients, heads
from fsam_core.torch.gradients import Gradients
from fsam_core.torch.info import Figures, Info
from fsam_core.torch.pass_config import PassConfig
from fsam_core.torch.replay import Replay
from fsam_kernels.torch.adamw import AdamW


class Found(NamedTuple):
    """What the passes of a step gave.

    Attributes:
        norm: ‖ĝ‖₂.
        config, batches: to name a wrong label, should the figures not be finite.
        info: the figures where the host has read them.
    """

    loss: Tensor
    g_hat: Gradients
    norm: Any
    figures: Figures
    config: PassConfig
    batches: list[Any]
    info: Info | None


def explain(found: Found, replay: Replay) -> None:
    """Raise for labels and weights that cannot be right; on a CPU the pass itself has done so."""
    if all(p.device.type == "cpu" for p in found.config.params):
        return
    with torch.no_grad(), replay.replayed():
        for batch in found.batches:
            heads.flat(found.config.call_features(batch), "now")


class Verdict(NamedTuple):
    """How a step ends: numbers that the host has read, or scalar tensors that it has not.

    Attributes:
        clip: the factor of ĝ.
        skip: whether nothing is updated; as a tensor 1.0 for yes.
    """

    clip: float | Tensor
    skip: bool | Tensor


def verdict(found: Found, clip_norm: float | None) -> Verdict:
    """By numbers where the figures were read, else by tensors, and the figures are sent to the host."""
    if found.info is not None:
        clips = clip_norm is not None and not found.info.skipped and found.info.grad_norm > clip_norm
        return Verdict((clip_norm or 1.0) / found.info.grad_norm if clips else 1.0, found.info.skipped)
    found.figures.send()
    clip = 1.0 if clip_norm is None else (clip_norm / found.norm).clamp(max=1.0)
    return Verdict(clip, found.figures.not_finite)


def can_stay_on_device(optimizers: Sequence[torch.optim.Optimizer], params: Sequence[Any], sharded: bool) -> bool:
    """Whether these optimizers can clip and skip by tensors, and have a device to do it on.

    `fsam_core.torch.AdamW` can, but not with random rounding, which depends on a step count on the host. So can
    PyTorch's with fused=True, by the attributes that its GradScaler sets, but not for shards.
    """
    if any(p.device.type == "cpu" for p in params):
        return False
    fused = [getattr(one, "_step_supports_amp_scaling", False) and not sharded for one in optimizers]
    own = [isinstance(one, AdamW) and not one.rounding.stochastic for one in optimizers]
    return all(map(max, fused, own))


def apply(
    optimizers: Sequence[torch.optim.Optimizer], g_hat: Gradients, verdict: Verdict, sparse: Collection[Any]
) -> None:
    """Write ĝ and take the optimizers' step. Where all of them clip by themselves, `.grad` may be ĝ before that."""
    own = all(isinstance(one, AdamW) for one in optimizers)
    if not isinstance(verdict.skip, Tensor):
        gradients.write(g_hat if own else clipped(g_hat, verdict.clip), sparse)
        how: dict[str, Any] = {"clip": verdict.clip} if own else {}
        for optimizer in optimizers:
            optimizer.step(**how)
        return
    gradients.write(g_hat, sparse)
    for optimizer in optimizers:
        if isinstance(optimizer, AdamW):
            optimizer.step(clip=verdict.clip, found_inf=verdict.skip)
        else:
            _step_fused(optimizer, verdict)


def clipped(g_hat: Gradients, clip: float | Tensor) -> Gradients:
    """ĝ times the factor, in place."""
    if isinstance(clip, Tensor) or clip != 1:
        gradients.scale(g_hat.values(), clip)
    return g_hat


def for_scaler(g_hat: Gradients, verdict: Verdict, scale: float | Tensor) -> Gradients:
    """ĝ as a GradScaler expects it, clipped and scaled, in place."""
    if verdict.skip:  # each optimizer is to skip, also where its own part of ĝ is finite
        return {p: torch.full_like(g, torch.inf) for p, g in g_hat.items()}
    gradients.scale(clipped(g_hat, verdict.clip).values(), scale)
    return g_hat


def _step_fused(optimizer: Any, verdict: Verdict) -> None:
    """The step of one of PyTorch's fused optimizers: it divides its gradients by `grad_scale` and obeys `found_inf`."""
    if isinstance(verdict.clip, Tensor):
        optimizer.grad_scale = 1 / verdict.clip
    optimizer.found_inf = verdict.skip
    try:
        optimizer.step()
    finally:
        optimizer.__dict__.pop("grad_scale", None)
        del optimizer.found_inf
