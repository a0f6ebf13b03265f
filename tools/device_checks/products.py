"""Correctness of the whole head with its matrix products, in both backends, against float64 on the device."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import fsam_kernels.torch
import fsam_kernels.triton
from device_checks.errors import relative_norm
from device_checks.logits import reference
from device_checks.report import Report
from device_checks.sizes import Sizes
from fsam_kernels.memory import row_bytes
from fsam_kernels.options import CROSS_ENTROPY

BACKENDS = {"torch": fsam_kernels.torch, "triton": fsam_kernels.triton}
# Of the norm; a library may add the parts of a long half-precision product in half precision.
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
CHUNKS = 3


def run(report: Report, sizes: Sizes) -> None:
    N, D, V = (300, 64, 50257) if sizes.device == "cuda" else (9, 16, 4500)
    for (name, ops), dtype, keep in itertools.product(BACKENDS.items(), ALLOWED, (False, True)):
        title = f"head, {name}, {str(dtype).removeprefix('torch.')}, {'kept' if keep else 'recomputed'}"
        report.check(title, lambda: errors(ops, N, D, V, dtype, keep, sizes.device))


def errors(ops: Any, N: int, D: int, V: int, dtype: torch.dtype, keep: bool, device: str) -> dict[str, float]:
    """Of the first pass and of a second one at other weights; w̄ alone, and added to an array."""
    make = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=make).to(dtype)
    h_NxD, w_VxD, second_NxD, moved_VxD = draw(N, D), 0.2 * draw(V, D), draw(N, D), 0.2 * draw(V, D)
    labels_N = torch.randint(0, V, (N,), device=device, generator=make)
    labels_N[1] = -1
    weights_N = torch.rand(N, device=device, generator=make) / N
    there_VxD = torch.randn(V, D, device=device, generator=make) / N
    chunk_bytes = -(-N // CHUNKS) * row_bytes(V, dtype.itemsize, 4, CROSS_ENTROPY)
    # The products of the first pass have logits rounded to `dtype`; the reference has them, too.
    logits_NxV = (h_NxD @ w_VxD.T).double() if dtype != torch.float32 else h_NxD.double() @ w_VxD.double().T
    zbar_NxV = reference(logits_NxV, labels_N, CROSS_ENTROPY).p_CxV * weights_N[:, None]
    options = {"chunk_bytes": chunk_bytes, "upcast_wbar": True}
    inputs = h_NxD, w_VxD, labels_N, weights_N
    _, _, z, first = ops.linear_cross_entropy(*inputs, gradient=True, keep=keep, **options)
    second = ops.logit_vjp(z, second_NxD, moved_VxD, **options)
    added = ops.logit_vjp(z, second_NxD, moved_VxD, onto_VxD=there_VxD.clone(), chunk_bytes=chunk_bytes)
    wbar_VxD = zbar_NxV.T @ second_NxD.double()
    pairs = {
        "first hbar": (first.hbar_NxD, zbar_NxV @ w_VxD.double()),
        "first wbar": (first.wbar_VxD, zbar_NxV.T @ h_NxD.double()),
        "second hbar": (second.hbar_NxD, zbar_NxV @ moved_VxD.double()),
        "second wbar": (second.wbar_VxD, wbar_VxD),
        "wbar added": (added.wbar_VxD.double() - there_VxD.double(), wbar_VxD),
    }
    return {name: relative_norm(*pair, ALLOWED[dtype]) for name, pair in pairs.items()}
