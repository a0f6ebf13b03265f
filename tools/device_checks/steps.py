"""Whole training steps: time, share of idle time, launches and peak memory, against the textbook's AdamW."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fsam_core.torch as fsam
from device_checks.clock import idle_share, milliseconds, peak_bytes
from device_checks.decoder import Decoder, features
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_core import backends
from fsam_profiling.timing import textbook_torch

RHO, RATE, CLIP = 0.1, 1e-4, 1.0
BETAS = (0.9, 0.95)
FUNCTIONAL = partial(fsam.FunctionalSAM, RHO, precondition="adam")
METHODS: dict[str, Callable[[], Any]] = {
    "adamw": fsam.Plain,
    "sam": lambda: fsam.SAM(RHO, precondition="adam"),
    "exact": FUNCTIONAL,
    "1/4": lambda: FUNCTIONAL(fraction=1 / 4),
    "1/8": lambda: FUNCTIONAL(fraction=1 / 8),
    "split": lambda: fsam.SAM(RHO, precondition="adam", form="split", fraction=1 / 2, ascent="rest"),
}


def run(report: Report, sizes: Sizes) -> None:
    variants: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {"textbook": textbook}
    for backend in ("torch", "triton"):
        for name, method in METHODS.items():
            variants[f"{name}, {backend}"] = partial(ours, method=method, backend=backend)
    for name, config in sizes.models.items():
        model = Decoder(config, sizes.device)
        for variant, make in variants.items():
            of_variant(report, sizes, f"{name}, {variant}", model, make)


def of_variant(report: Report, sizes: Sizes, title: str, model: Decoder, make: Callable[..., Any]) -> None:
    """One copy of the model for all numbers of tokens."""
    step: list[Any] = []
    device, (L, V) = sizes.device, (model.config.seq_len, model.config.vocab_size)

    def measure(tokens: int) -> dict[str, Any]:
        if not step:
            step.append(make(copy.deepcopy(model)))
        call = partial(step[0], torch.randint(0, V, (tokens // L, L + 1), device=device))
        found: dict[str, Any] = {"ms": milliseconds(call, device, max(1, sizes.repeats // 2))}
        return found | {"peak_bytes": peak_bytes(call, device), **idle_share(call, device)}

    for tokens in sizes.tokens:
        report.case(f"{title}, {tokens} tokens", partial(measure, tokens))
    step.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def textbook(model: nn.Module) -> Callable[[Tensor], Any]:
    """Fused AdamW, bfloat16 by autocast, the loss of float32 logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, fused=True)

    def logits(model: nn.Module, tokens_BxL1: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(tokens_BxL1.device.type, torch.bfloat16):
            h_NxD, w_VxD = model(tokens_BxL1[:, :-1])
            z_NxV = h_NxD @ w_VxD.T
        return z_NxV.float(), tokens_BxL1[:, 1:].reshape(-1)

    return textbook_torch.step("adamw", model, optimizer, logits, 0.0, CLIP)


def ours(model: nn.Module, *, method: Callable[[], Any], backend: str) -> Callable[[Tensor], Any]:
    """A bfloat16 model over float32 masters."""
    copies = fsam.masters(model)
    optimizer = backends.load("torch", backend).AdamW(copies, lr=RATE, betas=BETAS, copies=copies)
    for master in copies:  # the direction needs second moments in the first step
        zeros = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] = {"step": torch.tensor(0.0), **zeros}
    return fsam.Step(model, optimizer, method(), features=features, clip_norm=CLIP, backend=backend)
